//! The answer to a client that speaks without TLS at a TLS port. It tells the user what to change. Pure.

/// The advice in all answers.
const ADVICE: &str = "this port speaks TLS: use grpcs:// or https:// instead of grpc:// or http://";
/// The first byte of a TLS connection: a handshake record.
const HANDSHAKE_RECORD: u8 = 0x16;
/// The first bytes of HTTP/2 without TLS.
const HTTP2_PREFACE: &[u8] = b"PRI ";
/// How many of the first bytes are needed to recognise the protocol.
pub(super) const OPENING_BYTES: usize = HTTP2_PREFACE.len();
/// The HTTP/2 error code INADEQUATE_SECURITY (RFC 9113, section 7).
const INADEQUATE_SECURITY: u32 = 0xc;

/// The answer to a client that sent these first bytes; `None` if they begin a TLS handshake. Empty if the protocol is
/// unknown.
pub(super) fn answer(opening: &[u8]) -> Option<Vec<u8>> {
    if opening.first() == Some(&HANDSHAKE_RECORD) {
        return None;
    }
    Some(if opening.starts_with(HTTP2_PREFACE) {
        http2()
    } else if opening.iter().all(|byte| byte.is_ascii_uppercase() || *byte == b' ') {
        http1()
    } else {
        Vec::new()
    })
}

fn http1() -> Vec<u8> {
    format!(
        "HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\nconnection: close\r\ncontent-length: \
         {}\r\n\r\n{ADVICE}\n",
        ADVICE.len() + 1
    )
    .into_bytes()
}

/// Empty SETTINGS, and a GOAWAY whose debug data gRPC clients show to their users.
fn http2() -> Vec<u8> {
    let mut bytes = vec![0, 0, 0, 4, 0, 0, 0, 0, 0];
    let length = u8::try_from(8 + ADVICE.len()).unwrap_or(u8::MAX);
    bytes.extend([0, 0, length, 7, 0, 0, 0, 0, 0]);
    bytes.extend(0_u32.to_be_bytes());
    bytes.extend(INADEQUATE_SECURITY.to_be_bytes());
    bytes.extend(ADVICE.bytes().take(usize::from(length) - 8));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_protocol_without_tls_is_answered_in_its_own_language() {
        assert_eq!(answer(&[HANDSHAKE_RECORD, 3, 1, 2]), None);
        let http1 = String::from_utf8(answer(b"GET ").unwrap()).unwrap();
        let (head, body) = http1.split_once("\r\n\r\n").unwrap();
        assert!(
            head.starts_with("HTTP/1.1 400 ") && head.contains(&format!("content-length: {}", body.len()))
        );
        let http2 = answer(b"PRI ").unwrap();
        assert_eq!(usize::from(http2[11]), http2.len() - 18, "the length of GOAWAY");
        assert!(http2.ends_with(ADVICE.as_bytes()) && body.contains(ADVICE));
        for other in [&b"\x80\x2e\x01\x00"[..], b"SSH-", &[0; 4]] {
            assert_eq!(answer(other), Some(Vec::new()), "{other:?}");
        }
    }
}
