//! Routes by which connections to excluded addresses fail at once, with `EHOSTUNREACH` or `ENETUNREACH`.

use super::{
    super::{SetupFailure, Step as _},
    AddressRange,
};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};
use std::{
    io,
    net::IpAddr,
    os::fd::{AsFd as _, BorrowedFd},
};

// From linux/rtnetlink.h and linux/netlink.h. The libc crate has only some of them.
const NEW_ROUTE: u16 = 24;
const REQUEST_CREATE_AND_ANSWER: u16 = 0x0001 | 0x0400 | 0x0004;
const MAIN_TABLE: u8 = 254;
const STATIC: u8 = 4;
const SCOPE_UNIVERSE: u8 = 0;
const UNREACHABLE: u8 = 7;
const DESTINATION: u16 = 1;
const HEADER_BYTES: usize = 16;
const ROUTE_BYTES: usize = 12;
const ATTRIBUTE_BYTES: usize = 4;

/// Makes these addresses unreachable in this network namespace.
pub(super) fn exclude(ranges: &[AddressRange]) -> Result<(), SetupFailure> {
    // The default protocol of netlink sockets is for routes.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)
        .step("open a socket for routes")?;
    for range in ranges {
        match add(socket.as_fd(), range) {
            // A range may be the only address of another one. Without IPv6, nothing there can be reached anyhow.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists || range.first.is_ipv6() => {}
            added => added.step(format_args!("exclude {}/{} from the network", range.first, range.bits))?,
        }
    }
    Ok(())
}

fn add(socket: BorrowedFd<'_>, range: &AddressRange) -> io::Result<()> {
    send(socket, &unreachable(range), SendFlags::empty())?;
    let mut answer = [0; 1024];
    let (_, length) = recv(socket, &mut answer, RecvFlags::empty())?;
    let errno = answer[..length].get(HEADER_BYTES..HEADER_BYTES + 4).and_then(|errno| errno.try_into().ok());
    match errno.map(i32::from_ne_bytes) {
        Some(0) => Ok(()),
        Some(errno) => Err(io::Error::from_raw_os_error(errno.saturating_neg())),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// The message that makes a range of addresses unreachable.
fn unreachable(range: &AddressRange) -> Vec<u8> {
    let (family, address) = match range.first {
        IpAddr::V4(first) => (AddressFamily::INET, first.octets().to_vec()),
        IpAddr::V6(first) => (AddressFamily::INET6, first.octets().to_vec()),
    };
    let attribute = ATTRIBUTE_BYTES + address.len();
    let length = HEADER_BYTES + ROUTE_BYTES + attribute;
    let mut message = Vec::with_capacity(length);
    // Lengths are below 100, and so is the number of a family.
    message.extend((length as u32).to_ne_bytes());
    message.extend(NEW_ROUTE.to_ne_bytes());
    message.extend(REQUEST_CREATE_AND_ANSWER.to_ne_bytes());
    message.extend([0; 8]);
    message.extend([
        family.as_raw() as u8,
        range.bits,
        0,
        0,
        MAIN_TABLE,
        STATIC,
        SCOPE_UNIVERSE,
        UNREACHABLE,
    ]);
    message.extend([0; 4]);
    message.extend((attribute as u16).to_ne_bytes());
    message.extend(DESTINATION.to_ne_bytes());
    message.extend(address);
    message
}
