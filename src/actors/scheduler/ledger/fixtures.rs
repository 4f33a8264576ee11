//! Actions, requests and ledgers for the tests of this module.

use super::*;
use crate::{
    action::{Command, DirectoryFormat},
    actors::scheduler::{
        operation::{ClientInfo, Inline},
        slots::PoolSpec,
    },
    caller::Peer,
    instance::Instances,
    limits::{LimitSettings, Room},
    platform::Offer,
};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    path::RootPath,
};

/// An action for tests. Its name determines its digest.
#[derive(Clone, Copy)]
pub(crate) struct Work {
    pub(crate) name: u64,
    pub(crate) do_not_cache: bool,
    /// The requested value of the property `OSFamily`.
    pub(crate) platform: Option<&'static str>,
    /// The requested `cores`; 0 for none.
    pub(crate) cores: u64,
    /// Whether it names a container image.
    pub(crate) image: bool,
}

pub(crate) fn work(name: u64) -> Work {
    Work { name, do_not_cache: false, platform: None, cores: 0, image: false }
}

/// The request of one run of a build tool.
pub(crate) fn submit_of(invocation: &str, work: &Work) -> Submit {
    let client = ClientInfo { tool_invocation_id: invocation.into(), ..Default::default() };
    Submit { client, ..submit(work) }
}

pub(crate) fn instance() -> Instance {
    Instances::new([""]).unwrap().get("").unwrap()
}

/// The peer at this loopback address.
pub(crate) fn peer(number: u8) -> Peer {
    Peer::V4(std::net::Ipv4Addr::new(127, 0, 0, number))
}

/// The digest of an action.
pub(crate) fn digest(work: &Work) -> Digest {
    Digest::parse(DigestFunction::Sha256, &format!("{:064x}", work.name), 1).unwrap()
}

pub(crate) fn submit(work: &Work) -> Submit {
    Submit {
        instance: instance(),
        action: digest(work),
        skip_cache_lookup: false,
        priority: 0,
        inline: Inline::default(),
        client: ClientInfo::default(),
        principal: Default::default(),
        limits: Default::default(),
        caller: Default::default(),
    }
}

pub(crate) fn resolution(work: &Work, cached: bool) -> Resolution {
    if cached {
        return Resolution::Cached(Default::default());
    }
    let command = Command {
        arguments: vec!["true".into()],
        environment: vec![],
        working_directory: RootPath::root(),
        outputs: vec![],
        report_mtime: false,
        report_unix_mode: false,
        directory_format: DirectoryFormat::default(),
    };
    Resolution::Run(Arc::new(Action {
        instance: instance(),
        digest: digest(work),
        command,
        input_root: digest(work),
        timeout: Duration::from_secs(100),
        do_not_cache: work.do_not_cache,
        platform: properties(work),
    }))
}

/// The platform properties of an action.
pub(crate) fn properties(work: &Work) -> Vec<(String, String)> {
    let family = work.platform.map(|value| ("OSFamily".to_owned(), value.to_owned()));
    let cores = (work.cores > 0).then(|| ("cores".to_owned(), work.cores.to_string()));
    let image = work.image.then(|| ("container-image".to_owned(), "oci:/image".to_owned()));
    family.into_iter().chain(cores).chain(image).collect()
}

pub(crate) fn settings() -> SchedulerSettings {
    SchedulerSettings {
        queue_timeout: Duration::from_secs(3600),
        transfer_timeout: Duration::from_secs(1000),
        ..SchedulerSettings::default()
    }
}

pub(crate) fn ledger_with(settings: SchedulerSettings, pools: &[(usize, &str)]) -> Ledger {
    Ledger::new(settings, pools.iter().map(|&(slots, family)| pool(slots, family)).collect())
}

/// A pool whose tasks share this many cores, and a gigabyte for each.
pub(crate) fn pool_with_room(cores: u64, family: &str) -> PoolSpec {
    let room = Room { cores, memory: cores << 30 };
    let slots = usize::try_from(cores).unwrap();
    PoolSpec { limits: LimitSettings::default().within(&room), room: Some(room), ..pool(slots, family) }
}

/// A pool for one family of systems.
pub(crate) fn pool(slots: usize, family: &str) -> PoolSpec {
    PoolSpec {
        name: format!("pool-{family}"),
        section: format!("execution.pools.pool-{family}"),
        worker: format!("host/pool-{family}"),
        slots,
        offers: [("OSFamily".to_owned(), Offer::Exact(family.into()))].into(),
        limits: LimitSettings::default(),
        room: None,
    }
}
