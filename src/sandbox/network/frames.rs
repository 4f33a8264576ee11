//! The filter of the frames that leave a cell: a classic BPF program on the interface through which they get to the
//! gateway. It passes the traffic of ARP and of IPv6 neighbour discovery, and IP packets whose destination is not
//! excluded. Pure, except for [`attach`].

use super::{super::sys, AddressRange};
use libc::sock_filter;
use std::{io, net::IpAddr, os::fd::BorrowedFd};

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const LOAD_HALF: u32 = libc::BPF_LD | libc::BPF_H | libc::BPF_ABS;
const LOAD_BYTE: u32 = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
const AND: u32 = libc::BPF_ALU | libc::BPF_AND | libc::BPF_K;
const GO_TO: u32 = libc::BPF_JMP | libc::BPF_JA;
const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const ANSWER: u32 = libc::BPF_RET | libc::BPF_K;

/// The answer that drops a frame.
const DROP: u32 = 0;
/// The answer that passes a frame: its bytes, up to this number.
const PASS: u32 = u32::MAX;

// Offsets in an Ethernet frame.
const TYPE: u32 = 12;
const V4_DESTINATION: u32 = 30;
const V6_NEXT_HEADER: u32 = 20;
const V6_DESTINATION: u32 = 38;
const V6_PAYLOAD: u32 = 54;

const TYPE_V4: u32 = 0x0800;
const TYPE_ARP: u32 = 0x0806;
const TYPE_V6: u32 = 0x86dd;
const ICMP_V6: u32 = 58;
const NEIGHBOUR_SOLICITATION: u32 = 135;
const NEIGHBOUR_ADVERTISEMENT: u32 = 136;

/// The program that drops packets to these addresses.
pub(crate) fn program(excluded: &[AddressRange]) -> Vec<sock_filter> {
    let (v4, v6): (Vec<_>, Vec<_>) = excluded.iter().partition(|range| range.first.is_ipv4());
    let v4: Vec<_> = v4.into_iter().flat_map(drop_in).chain([one(ANSWER, PASS)]).collect();
    let v6: Vec<_> = v6.into_iter().flat_map(drop_in).chain([one(ANSWER, PASS)]).collect();
    let mut all = vec![
        one(LOAD_HALF, TYPE),
        branch(TYPE_ARP, 0, 1),
        one(ANSWER, PASS),
        // A conditional jump cannot go far.
        branch(TYPE_V4, 0, 1),
        one(GO_TO, 3),
        branch(TYPE_V6, 0, 1),
        one(GO_TO, 1 + u32::try_from(v4.len()).unwrap_or(u32::MAX)),
        one(ANSWER, DROP),
    ];
    all.extend(v4);
    // The gateway answers neighbour discovery itself, wherever it is addressed to.
    all.extend([
        one(LOAD_BYTE, V6_NEXT_HEADER),
        branch(ICMP_V6, 0, 4),
        one(LOAD_BYTE, V6_PAYLOAD),
        branch(NEIGHBOUR_SOLICITATION, 1, 0),
        branch(NEIGHBOUR_ADVERTISEMENT, 0, 1),
        one(ANSWER, PASS),
    ]);
    all.extend(v6);
    all
}

/// Filters the frames that a process receives through this tap interface, which it has open.
pub(crate) fn attach(tap: BorrowedFd<'_>, mut program: Vec<sock_filter>) -> io::Result<()> {
    sys::filter_frames(tap, &mut program)
}

/// Drops the packet if its destination is in the range; otherwise continues after these instructions.
fn drop_in(range: &AddressRange) -> Vec<sock_filter> {
    let (start, words) = match range.first {
        IpAddr::V4(first) => (V4_DESTINATION, vec![first.to_bits()]),
        IpAddr::V6(first) => {
            let octets = first.octets();
            let word = |at: usize| {
                octets[at..at + 4].iter().fold(0, |word: u32, octet| word << 8 | u32::from(*octet))
            };
            (V6_DESTINATION, [0, 4, 8, 12].map(word).into())
        }
    };
    let mut instructions = vec![one(ANSWER, DROP)];
    // From the last word to the first, because each test that fails skips the ones after it.
    for (at, word) in words.into_iter().enumerate().rev() {
        let bits = u32::from(range.bits).saturating_sub(32 * at as u32).min(32);
        if bits == 0 {
            continue;
        }
        // There are at most 13 instructions.
        let test = branch(word & mask(bits), 0, instructions.len() as u8);
        let load = one(LOAD, start + 4 * at as u32);
        let part = (bits < 32).then(|| one(AND, mask(bits)));
        instructions.splice(0..0, [load].into_iter().chain(part).chain([test]));
    }
    instructions
}

/// The first `bits` bits of a word, of which there are 1 to 32.
fn mask(bits: u32) -> u32 {
    u32::MAX << (32 - bits)
}

fn one(code: u32, k: u32) -> sock_filter {
    // No code is larger than a byte.
    sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

/// Skips `yes` instructions if the accumulator is equal to `value`, and `no` instructions otherwise.
fn branch(value: u32, yes: u8, no: u8) -> sock_filter {
    sock_filter { jt: yes, jf: no, ..one(IF_EQUAL, value) }
}

#[cfg(test)]
mod tests {
    use super::{super::excluded, *};
    use proptest::prelude::*;
    use std::net::{Ipv4Addr, Ipv6Addr};

    /// What the kernel does with a program. A load beyond the end of the frame drops the frame.
    fn passes(program: &[sock_filter], frame: &[u8]) -> bool {
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            let load = |length: usize| {
                let bytes = frame.get(k as usize..k as usize + length)?;
                Some(bytes.iter().fold(0, |word: u32, byte| word << 8 | u32::from(*byte)))
            };
            let loaded = match u32::from(code) {
                LOAD => load(4),
                LOAD_HALF => load(2),
                LOAD_BYTE => load(1),
                AND => Some(accumulator & k),
                GO_TO => {
                    at += k as usize;
                    continue;
                }
                IF_EQUAL => {
                    at += usize::from(if accumulator == k { jt } else { jf });
                    continue;
                }
                ANSWER => return k != DROP,
                code => panic!("an unknown instruction {code}"),
            };
            let Some(value) = loaded else { return false };
            accumulator = value;
        }
    }

    fn frame(destination: IpAddr) -> Vec<u8> {
        let mut frame = vec![0; 60];
        let (kind, at, address) = match destination {
            IpAddr::V4(address) => (TYPE_V4, V4_DESTINATION, address.octets().to_vec()),
            IpAddr::V6(address) => (TYPE_V6, V6_DESTINATION, address.octets().to_vec()),
        };
        frame[12..14].copy_from_slice(&(kind as u16).to_be_bytes());
        frame[at as usize..at as usize + address.len()].copy_from_slice(&address);
        frame
    }

    fn address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            any::<u32>().prop_map(|bits| Ipv4Addr::from_bits(bits).into()),
            any::<u128>().prop_map(|bits| Ipv6Addr::from_bits(bits).into()),
        ]
    }

    proptest! {
        /// Tests addresses near the ends of a range, where a wrong mask or jump would show.
        #[test]
        fn a_packet_passes_unless_its_destination_is_excluded(
            ranges in prop::collection::vec((address(), 1..=128u8), 0..20),
            flips in prop::collection::vec(0..128u32, 0..3),
            chosen in any::<prop::sample::Index>(),
            other in address(),
        ) {
            let range = |(first, bits): &(IpAddr, u8)| match first {
                IpAddr::V4(_) => AddressRange { first: *first, bits: (*bits).min(32) },
                IpAddr::V6(_) => AddressRange { first: *first, bits: *bits },
            };
            let ranges: Vec<_> = ranges.iter().map(range).collect();
            let program = program(&ranges);
            let near = match ranges.get(chosen.index(ranges.len().max(1))).map_or(other, |range| range.first) {
                IpAddr::V4(address) => Ipv4Addr::from_bits(
                    flips.iter().fold(address.to_bits(), |bits, flip| bits ^ 1 << (flip % 32)),
                ).into(),
                IpAddr::V6(address) => Ipv6Addr::from_bits(
                    flips.iter().fold(address.to_bits(), |bits, flip| bits ^ 1 << flip),
                ).into(),
            };
            for destination in [near, other] {
                let is_excluded = ranges.iter().any(|range| range.contains(destination));
                prop_assert_eq!(passes(&program, &frame(destination)), !is_excluded, "{}", destination);
            }
        }
    }

    #[test]
    fn neighbours_are_found_and_unknown_protocols_are_dropped() {
        let program = program(&excluded(&[]));
        let mut solicitation = frame("fe80::1".parse().unwrap());
        assert!(!passes(&program, &solicitation));
        (solicitation[20], solicitation[54]) = (58, 135);
        assert!(passes(&program, &solicitation));
        solicitation[54] = 128;
        assert!(!passes(&program, &solicitation), "an echo request");
        let of_type = |kind: u16| {
            let mut frame = frame("8.8.8.8".parse().unwrap());
            frame[12..14].copy_from_slice(&kind.to_be_bytes());
            frame
        };
        assert!(passes(&program, &of_type(0x0800)) && passes(&program, &of_type(0x0806)));
        assert!(!passes(&program, &of_type(0x8100)) && !passes(&program, &of_type(0)));
        assert!(!passes(&program, &of_type(0x0800)[..20]), "a frame that is too short");
    }
}
