//! The configuration from outside: precedence, helpful errors, and the files that people read.
#![allow(clippy::unwrap_used, missing_docs)]

mod values;

use gorego::{
    config::{
        Config, Flag, Machine, Origin, Settings, Sources,
        load::{keys, load, variable_of},
        show::show,
    },
    platform::Offer,
    size::Size,
};
use std::{ffi::OsString, fs, os::unix::ffi::OsStringExt as _, path::PathBuf, time::Duration};

fn machine() -> Machine {
    Machine { cpus: 6, cache_home: Some("/home/u/.cache".into()), current_dir: "/cwd".into() }
}

fn env(pairs: &[(&str, &str)]) -> Vec<(OsString, OsString)> {
    pairs.iter().map(|(name, value)| (name.into(), value.into())).collect()
}

/// A file in a directory that exists as long as the test.
fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.toml");
    fs::write(&path, text).unwrap();
    (dir, path)
}

fn file_error(text: &str) -> String {
    let (_dir, path) = file(text);
    load(&Sources { file: Some(path), ..Sources::default() }).unwrap_err().to_string()
}

fn env_error(name: &str, value: &str) -> String {
    load(&Sources { env: env(&[(name, value)]), ..Sources::default() }).unwrap_err().to_string()
}

#[test]
fn gorego_toml_is_the_complete_default_configuration() {
    let text = include_str!("../../gorego.toml");
    assert_eq!(toml::from_str::<Config>(text).unwrap(), Config::default());
    let (_dir, path) = file(text);
    let loaded = load(&Sources { file: Some(path), ..Sources::default() }).unwrap();
    let all = keys(&Config::default());
    assert!(all.len() >= 20, "the list of keys is not empty: {all:?}");
    let mut last = 0;
    for (key, _) in all {
        // Every key is present, in the order of the types.
        let Origin::File(_, line) = loaded.origin(&key) else { panic!("{key} is not in gorego.toml") };
        assert!(*line > last, "{key} is out of order");
        last = *line;
    }
}

#[test]
fn a_flag_wins_over_the_environment_that_over_the_file_that_over_the_default() {
    let (_dir, path) =
        file("max_size_gb = 2\n\n[execution]\nconcurrency = 2\nqueue_size = 2\nretention = \"2m\"\n");
    let mut sources = Sources { file: Some(path.clone()), ..Sources::default() };
    sources.env =
        env(&[("GOREGO_EXECUTION__CONCURRENCY", "3"), ("GOREGO_EXECUTION__QUEUE_SIZE", "3"), ("HOME", "/x")]);
    sources.flags =
        vec![Flag { flag: "--concurrency", key: "execution.concurrency", value: toml::Value::Integer(4) }];
    let loaded = load(&sources).unwrap();
    let execution = &loaded.config.execution;
    assert_eq!(
        (execution.concurrency, execution.queue_size, loaded.config.max_size_gb),
        (4, 3, Size::from_gb(2))
    );
    assert_eq!(execution.retention, Duration::from_secs(120));
    assert_eq!(execution.max_attempts, Config::default().execution.max_attempts);
    for (key, origin) in [
        ("execution.concurrency", Origin::Flag("--concurrency".into())),
        ("execution.queue_size", Origin::Env("GOREGO_EXECUTION__QUEUE_SIZE".into())),
        ("execution.retention", Origin::File(path.clone(), 6)),
        ("max_size_gb", Origin::File(path, 1)),
        ("execution.max_attempts", Origin::Default),
    ] {
        assert_eq!(loaded.origin(key), &origin, "{key}");
    }
}

#[test]
fn every_key_can_be_set_by_its_variable() {
    for (key, value) in keys(&Config::default()) {
        let text = match &value {
            toml::Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let loaded =
            load(&Sources { env: env(&[(&variable_of(&key), &text)]), ..Sources::default() }).unwrap();
        assert_eq!(loaded.config, Config::default(), "{key}");
        let set = if text.is_empty() { Origin::Default } else { Origin::Env(variable_of(&key)) };
        assert_eq!(loaded.origin(&key), &set);
    }
    let lists = env(&[
        ("GOREGO_INSTANCE_NAMES", "[\"\", \"a/b\"]"),
        ("GOREGO_EXECUTION__PLATFORM", "{ OSFamily = \"linux\", pool = \"big\" }"),
    ]);
    let config = load(&Sources { env: lists, ..Sources::default() }).unwrap().config;
    assert_eq!(config.instance_names, ["", "a/b"]);
    assert_eq!(config.execution.platform.get("pool").map(String::as_str), Some("big"));
}

#[test]
fn errors_in_a_file_show_the_place_and_what_was_meant() {
    for (text, parts) in [
        (
            "\nlisten_adr = \"x\"\n",
            &[":2:1: unknown key \"listen_adr\"", "did you mean \"listen_addr\"", "^^^^^^^^^^"][..],
        ),
        ("[execution]\nconcurency = 1\n", &[":2:1: ", "did you mean \"execution.concurrency\""]),
        ("[htp]\nlisten_addr = \"127.0.0.1:1\"\n", &[":1:2: unknown key \"htp\"", "did you mean \"http\""]),
        ("concurrency = 1\n", &[":1:1: ", "did you mean \"execution.concurrency\""]),
        ("[exection]\nconcurrency = 1\n", &[":1:2: unknown key \"exection\""]),
        (
            "listen_adr = \"x\"\n[execution]\nconcurency = 1\n",
            &[":1:1: unknown key \"listen_adr\"", ":3:1: unknown key \"execution.concurency\""],
        ),
        ("execution = 1\n", &[":1:13: ", "is a section", "[execution]"]),
        ("max_size_gb = \"fifty\"\n", &[":1:15: ", "fifty"]),
        ("max_size_gb = -1\n", &[":1:15: ", "-1"]),
        ("[execution]\n\nretention = \"ten minutes\"\n", &[":3:13: "]),
        ("listen_addr = \"localhost:1\"\n", &[":1:15: ", "127.0.0.1:50051"]),
        ("[log]\nformat = \"xml\"\n", &[":2:10: ", "json"]),
        ("a = \n", &[":1:"]),
        ("max_size_gb = 1\nmax_size_gb = 2\n", &[":2:1: ", "duplicate"]),
    ] {
        let error = file_error(text);
        for part in parts {
            assert!(error.contains(part), "{part} in {error}");
        }
    }
    for error in [file_error("zzzzzz = 1"), env_error("GOREGO_FOO", "1")] {
        assert!(!error.contains("did you mean"), "no suggestion is better than a wild one: {error}");
    }
    let absent =
        load(&Sources { file: Some("/nonexistent/x.toml".into()), ..Sources::default() }).unwrap_err();
    assert!(absent.to_string().contains("/nonexistent/x.toml does not exist"));
    let (_dir, path) = file("");
    fs::write(&path, b"a = 1\nb = \"\xff\"\n").unwrap();
    let binary = load(&Sources { file: Some(path), ..Sources::default() }).unwrap_err();
    assert!(binary.to_string().contains("line 2"), "{binary}");
}

#[test]
fn errors_in_the_environment_name_the_variable_and_what_was_meant() {
    for (name, value, parts) in [
        ("GOREGO_LISTEN_ADR", "x", &["GOREGO_LISTEN_ADR", "did you mean \"GOREGO_LISTEN_ADDR\""][..]),
        ("GOREGO_EXECUTION_CONCURRENCY", "1", &["did you mean \"GOREGO_EXECUTION__CONCURRENCY\""]),
        ("GOREGO_CONCURRENCY", "1", &["did you mean \"GOREGO_EXECUTION__CONCURRENCY\""]),
        ("GOREGO_CONFG", "x", &["did you mean \"GOREGO_CONFIG\""]),
        ("GOREGO_MAX_SIZE_GB", "fifty", &["GOREGO_MAX_SIZE_GB=\"fifty\"", "is not a size"]),
        ("GOREGO_MAX_SIZE_GB", "-1", &["GOREGO_MAX_SIZE_GB=\"-1\"", "cannot be negative"]),
        ("GOREGO_MAX_SIZE_GB", "5 XB", &["\"XB\" is not a unit"]),
        ("GOREGO_EXECUTION__QUEUE_SIZE", "many", &["whole number"]),
        ("GOREGO_ALLOW_UNAUTHENTICATED", "yes", &["true or false"]),
        ("GOREGO_LISTEN_ADDR", "somewhere", &["GOREGO_LISTEN_ADDR=\"somewhere\""]),
        ("GOREGO_INSTANCE_NAMES", "main", &["TOML value"]),
        ("GOREGO_INSTANCE_NAMES", "[]\nmax_size_gb = 1", &["one TOML value"]),
        ("GOREGO_EXECUTION__RETENTION", "soon", &["GOREGO_EXECUTION__RETENTION"]),
    ] {
        let error = env_error(name, value);
        for part in parts {
            assert!(error.contains(part), "{part} in {error}");
        }
    }
    let bytes = (OsString::from("GOREGO_LOCAL_CACHE_DIR"), OsString::from_vec(b"/\xff".to_vec()));
    let error = load(&Sources { env: vec![bytes], ..Sources::default() }).unwrap_err();
    assert!(error.to_string().contains("GOREGO_LOCAL_CACHE_DIR is not UTF-8"));
}

#[test]
fn an_empty_variable_counts_as_not_set() {
    let (_dir, path) = file("listen_addr = \"127.0.0.1:7\"\nmax_size_gb = 3\n");
    let empty = env(&[
        ("GOREGO_LISTEN_ADDR", ""),
        ("GOREGO_MAX_SIZE_GB", ""),
        ("GOREGO_EXECUTION__CONCURRENCY", ""),
        ("GOREGO_ALLOW_UNAUTHENTICATED", ""),
    ]);
    let loaded = load(&Sources { file: Some(path.clone()), env: empty, ..Sources::default() }).unwrap();
    assert_eq!(loaded.config.listen_addr.port(), 7);
    assert_eq!(loaded.config.max_size_gb, Size::from_gb(3));
    assert_eq!(loaded.origin("listen_addr"), &Origin::File(path, 1));
    assert_eq!(loaded.origin("execution.concurrency"), &Origin::Default);
    assert!(
        env_error("GOREGO_LISTN_ADDR", "").contains("GOREGO_LISTEN_ADDR"),
        "a mistyped name is still one"
    );
}

/// `--config` and the other flags that the environment can set.
#[test]
fn an_empty_variable_of_the_command_line_counts_as_not_set() {
    let (_dir, path) = file("listen_addr = \"127.0.0.1:7\"\n");
    let run = |args: &[&str], variables: &[(&str, &str)]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_gorego"));
        let output = command
            .args(args)
            .env_clear()
            .envs(variables.iter().copied())
            .env("HOME", "/x")
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).unwrap())
    };
    let (code, shown) = run(&["config", "show"], &[("GOREGO_CONFIG", ""), ("GOREGO_LISTEN_ADDR", "")]);
    assert!(code == Some(0) && shown.contains("50051"), "{shown}");
    let (code, shown) = run(&["config", "show"], &[("GOREGO_CONFIG", path.to_str().unwrap())]);
    assert!(code == Some(0) && shown.contains("127.0.0.1:7"), "{shown}");
    // Nothing but the default endpoint is asked.
    let unset = [("GOREGO_ENDPOINT", ""), ("GOREGO_CREDENTIAL_HELPER", ""), ("GOREGO_HEADERS", "x")];
    let (_, text) = run(&["ops", "list"], &unset);
    assert!(text.contains("GOREGO_HEADERS"), "no other variable is at fault: {text}");
    let (_, help) = run(&["ops", "list", "--help"], &unset);
    assert!(help.contains("default: grpc://127.0.0.1:50051"), "{help}");
}

#[test]
fn variables_that_are_not_meant_for_the_configuration_are_left_alone() {
    let env = env(&[
        ("GOREGO_CONFIG", "/x"),
        ("GOREGO_ENDPOINT", "grpc://a:1"),
        ("GOREGO", "x"),
        ("MY_GOREGO_X", "x"),
        // The variables that Kubernetes sets in every pod next to a service named "gorego".
        ("GOREGO_SERVICE_HOST", "10.0.0.1"),
        ("GOREGO_SERVICE_PORT_GRPC", "50051"),
        ("GOREGO_PORT", "tcp://10.0.0.1:50051"),
        ("GOREGO_PORT_50051_TCP_ADDR", "10.0.0.1"),
    ]);
    assert_eq!(load(&Sources { env, ..Sources::default() }).unwrap().config, Config::default());
}

fn check(text: &str) -> Result<Settings, String> {
    let (_dir, path) = file(text);
    let loaded =
        load(&Sources { file: Some(path), ..Sources::default() }).map_err(|error| error.to_string())?;
    Settings::new(&loaded, &machine()).map_err(|error| error.to_string())
}

#[test]
fn the_name_of_a_server_is_checked_and_empty_by_default() {
    assert!(check("").unwrap().node.is_empty());
    assert_eq!(check("node_name = \"build-3\"").unwrap().node.as_str(), "build-3");
    let error = check("node_name = \"build.example.com\"").unwrap_err().to_string();
    assert!(error.contains("node_name = \"build.example.com\"") && error.contains("lower-case"), "{error}");
}

#[test]
fn values_that_make_no_sense_are_refused_all_at_once_with_their_place() {
    let error = check(
        "max_size_gb = 0\ninstance_names = [\"a/blobs\"]\nlocal_cache_dir = \"~/x\"\n[log]\nfilter = \"warning\"\n\
         [execution]\nqueue_size = 0\nmax_attempts = 0\nretention = \"0s\"\ndefault_timeout = \"2days\"\n\
         max_timeout = \"2years\"\nconcurrency = 100000\n",
    )
    .unwrap_err();
    for part in [
        "max_size_gb = 0 (",
        "c.toml:1): must be between 1",
        "instance_names = [\"a/blobs\"]",
        "local_cache_dir = \"~/x\"",
        "log.filter = \"warning\"",
        "execution.queue_size = 0 (",
        "c.toml:7)",
        "execution.max_attempts",
        "execution.retention = \"0s\"",
        "execution.max_timeout",
        "execution.concurrency",
    ] {
        assert!(error.contains(part), "{part} in {error}");
    }
    let error = check("[execution]\nmax_timeout = \"10m\"\n").unwrap_err();
    assert!(error.contains("default_timeout = \"1h\" (default): is above execution.max_timeout"), "{error}");
    for text in
        ["instance_names = []", "instance_names = [\"a\", \"a\"]", "max_size_gb = 9223372036854775807"]
    {
        assert!(check(text).is_err(), "{text}");
    }
}

/// Without the file, users are not credentials, so the server would stay open.
#[test]
fn users_without_a_password_file_are_refused() {
    let users = "[access.users]\nalice = [\"developer\"]\n";
    let error = check(users).unwrap_err();
    assert!(error.contains("access.users") && error.contains("without access.passwords"), "{error}");
    check(&format!("[access]\npasswords = \"/p\"\n{users}")).unwrap();
}

/// AST-10.
#[test]
fn hosts_and_networks_that_are_no_rules_are_refused_by_key() {
    let error = check(
        "[assets]\nallowed_hosts = [\"example.com:8443\", \"https://x\"]\nallowed_networks = [\"10.0.0.0/33\"]\n\
         [http]\nallowed_hosts = [\"cache.test\", \"cache.test:80\"]\n",
    )
    .unwrap_err();
    for part in [
        "assets.allowed_hosts = [",
        "\"https://x\" is not a host, such as",
        "assets.allowed_networks = [",
        "\"10.0.0.0/33\" is not an address range",
        "http.allowed_hosts = [",
        "\"cache.test:80\" is not a host without a port",
    ] {
        assert!(error.contains(part), "{part} in {error}");
    }
    let settings =
        check("[assets]\nallowed_hosts = [\"*\"]\n[http]\nallowed_hosts = [\"*.test\"]\n").unwrap();
    assert_eq!((settings.assets.hosts.len(), settings.http_hosts.len()), (1, 1));
}

#[test]
fn pools_are_declared_in_the_shortest_form_that_says_how_they_match() {
    let settings = check(
        "[execution.pools.gpu]\nslots = 2\n[execution.pools.gpu.properties]\nOSFamily = \"linux\"\n\
         arch = [\"x86_64\", \"amd64\"]\ncores = { minimum = 16 }\n\"cache-silo-key\" = { ignore = true }\n\
         [execution.pools.linux]\nslots = 6\nproperties = { OSFamily = \"linux\" }\n[execution.pools.any]\nslots = 1\n",
    )
    .unwrap();
    let execution = settings.execution.unwrap();
    let pools: Vec<_> = execution.pools.iter().map(|pool| (pool.name.as_str(), pool.slots)).collect();
    assert_eq!(pools, [("any", 1), ("linux", 6), ("gpu", 2)], "the least special first");
    assert_eq!(execution.slots, 9);
    let gpu = |name: &str| execution.pools[2].offers[name].clone();
    let amd64 = Offer::Set(vec!["x86_64".into(), "amd64".into()]);
    let expected = [Offer::Exact("linux".into()), amd64, Offer::Ignore, Offer::Minimum(16)];
    assert_eq!(["OSFamily", "arch", "cache-silo-key", "cores"].map(gpu), expected);
    let local = check("").unwrap().execution.unwrap().pools;
    assert_eq!((local.len(), local[0].name.as_str(), local[0].slots), (1, "local", 6));
    assert_eq!(local[0].offers.get("OSFamily"), Some(&Offer::Exact("linux".into())));
    let sources =
        Sources { env: env(&[("GOREGO_EXECUTION__POOLS", "{ a = { slots = 3 } }")]), ..Sources::default() };
    let loaded = load(&sources).unwrap();
    let text = show(&loaded, &Settings::new(&loaded, &machine()).unwrap());
    let (_dir, path) = file(&text);
    let again = load(&Sources { file: Some(path), ..Sources::default() }).unwrap();
    assert_eq!(Settings::new(&again, &machine()).unwrap().execution.unwrap().slots, 3, "{text}");
}

#[test]
fn a_pool_has_either_slots_or_cores_and_memory() {
    let pool = |keys: &str| check(&format!("[execution.pools.a]\n{keys}"));
    let pools = pool("cores = 8\nmemory_gb = 32").unwrap().execution.unwrap().pools;
    assert_eq!((pools[0].slots, pools[0].room.map(|room| room.cores)), (8, Some(8)));
    assert_eq!(pools[0].limits.memory.default, 4_000_000_000, "each core has its part of the memory");
    for (keys, part) in [
        ("", "needs slots, or cores and memory_gb"),
        ("cores = 8", "needs slots, or cores and memory_gb"),
        ("slots = 1\ncores = 8\nmemory_gb = 32", "choose one"),
        ("cores = 0\nmemory_gb = 32", "between 1 and"),
        ("cores = 8\nmemory_gb = \"1 kB\"", "at least"),
    ] {
        let error = pool(keys).unwrap_err().to_string();
        assert!(error.contains(part), "{part} in {error}");
    }
}

#[test]
fn a_mistake_in_a_pool_is_shown_with_its_place_and_what_to_write_instead() {
    let pool = |rest: &str| file_error(&format!("[execution.pools.a]\n{rest}\n"));
    for (error, parts) in [
        (
            pool("slot = 1"),
            &[":2:1: unknown key \"execution.pools.a.slot\"", "did you mean \"execution.pools.a.slots\""][..],
        ),
        (pool("slots = 1\nproperties = { cores = 4 }"), &[":3:", "{ minimum = 4 }", "\"4\""]),
        (pool("slots = 1\nproperties = { cores = { maximum = 4 } }"), &[":3:", "maximum", "minimum"]),
        (
            pool("slots = 1\nproperties = { cores = { minimum = 4, ignore = true } }"),
            &[":3:", "only one form"],
        ),
        (pool("slots = 1\nproperties = { cores = { minimum = \"x\" } }"), &[":3:"]),
        (pool("slots = 1\nproperties = { arch = [] }"), &[":3:", "offers nothing"]),
        (pool("slots = 1\nproperties = { silo = { ignore = false } }"), &[":3:", "omit the property"]),
        (file_error("[execution]\nunknown_properties = \"allow\"\n"), &[":2:22: ", "ignore", "refuse"]),
        (file_error("[execution]\npools = 1\n"), &[":2:9: "]),
    ] {
        for part in parts {
            assert!(error.contains(part), "{part} in {error}");
        }
    }
    let error = check(
        "[execution]\nconcurrency = 2\nplatform = { a = \"b\" }\npriority_ageing = \"0s\"\n\
         min_priority = 1\nmax_priority = 1001\n\
         [execution.pools.\"a/b\"]\nslots = 0\n[execution.pools.c]\nslots = 4096\nproperties = { \"\" = \"x\" }\n\
         [execution.pools.d]\nslots = 1\n",
    )
    .unwrap_err();
    for part in [
        "execution.concurrency = 2 (",
        "each pool has its own slots",
        "each pool has its own properties",
        "execution.priority_ageing",
        "execution.min_priority = 1 (",
        "execution.max_priority = 1001 (",
        "\"a/b\" cannot be the name of a pool",
        "slots of \"a/b\" must be between 1",
        "\"c\" has a property without a name",
        "4097 slots together",
    ] {
        assert!(error.contains(part), "{part} in {error}");
    }
}

#[test]
fn strangers_are_kept_out_unless_somebody_says_otherwise() {
    for address in ["0.0.0.0:1", "192.168.1.1:1", "[::]:1", "[2001:db8::1]:1", "[::ffff:10.0.0.1]:1"] {
        let error = check(&format!("listen_addr = \"{address}\"")).unwrap_err();
        assert!(error.contains("allow_unauthenticated = true"), "{error}");
        let allowed = check(&format!("listen_addr = \"{address}\"\nallow_unauthenticated = true")).unwrap();
        assert!(allowed.warnings[0].contains("everyone"), "{:?}", allowed.warnings);
    }
    for address in ["127.0.0.1:1", "127.8.8.8:1", "[::1]:1", "[::ffff:127.0.0.1]:1"] {
        let settings = check(&format!("listen_addr = \"{address}\"")).unwrap();
        assert_eq!(settings.warnings, Vec::<String>::new());
    }
}

#[test]
fn the_http_port_differs_from_the_grpc_port_on_the_same_address() {
    for (grpc, http, is_fine) in [
        ("127.0.0.1:7", "127.0.0.1:7", false),
        ("127.0.0.1:7", "[::ffff:127.0.0.1]:7", false),
        ("0.0.0.0:7", "127.0.0.1:7", false),
        ("[::1]:7", "[::]:7", false),
        ("127.0.0.1:7", "[::]:7", false),
        ("127.0.0.1:7", "127.0.0.1:8", true),
        ("127.0.0.1:0", "127.0.0.1:0", true),
        ("127.0.0.1:7", "127.0.0.2:7", true),
        ("0.0.0.0:7", "[::1]:7", true),
    ] {
        let checked = check(&format!(
            "listen_addr = \"{grpc}\"\nallow_unauthenticated = true\n[http]\nlisten_addr = \"{http}\""
        ));
        match checked {
            Ok(_) => assert!(is_fine, "{grpc} {http}"),
            Err(error) => {
                assert!(!is_fine && error.contains("http.listen_addr = "), "{grpc} {http}: {error}");
                assert!(error.contains("has the same port as listen_addr"), "{error}");
            }
        }
    }
}

#[test]
fn zero_and_empty_are_replaced_by_what_they_stand_for() {
    let settings = check("max_size_gb = 5\n").unwrap();
    let execution = settings.execution.unwrap();
    assert_eq!(settings.cache_dir, PathBuf::from("/home/u/.cache/gorego"));
    assert_eq!(execution.build_root, PathBuf::from("/home/u/.cache/gorego/build"));
    assert_eq!((execution.slots, settings.max_size_bytes), (6, 5_000_000_000));
    assert_eq!(settings.max_blob_bytes, settings.max_size_bytes, "no blob is larger than the store");
    let settings =
        check("local_cache_dir = \"data\"\n[execution]\nbuild_root = \"/b\"\nconcurrency = 9\n").unwrap();
    let execution = settings.execution.unwrap();
    assert_eq!(settings.cache_dir, PathBuf::from("/cwd/data"));
    assert_eq!((execution.build_root, execution.slots), (PathBuf::from("/b"), 9));
    assert!(check("[execution]\nenabled = false\n").unwrap().execution.is_none());
    let loaded = load(&Sources::default()).unwrap();
    let homeless = Machine { cache_home: None, ..machine() };
    let error = Settings::new(&loaded, &homeless).unwrap_err().to_string();
    assert!(error.contains("no cache directory"), "{error}");
}

#[test]
fn what_is_shown_can_be_loaded_again_and_says_where_it_came_from() {
    let sources = Sources { env: env(&[("GOREGO_MAX_SIZE_GB", "7")]), ..Sources::default() };
    let loaded = load(&sources).unwrap();
    let text = show(&loaded, &Settings::new(&loaded, &machine()).unwrap());
    assert!(text.contains("max_size_gb = 7  # environment GOREGO_MAX_SIZE_GB"), "{text}");
    assert!(text.contains("concurrency = 6  # default, worked out"), "{text}");
    assert!(text.contains("queue_size = 20000  # default\n"), "{text}");
    let again: Config = toml::from_str(&text).unwrap();
    assert_eq!((again.max_size_gb, again.execution.concurrency), (Size::from_gb(7), 6));
    assert_eq!(again.local_cache_dir, PathBuf::from("/home/u/.cache/gorego"));
    assert_eq!(again.execution.platform, Config::default().execution.platform);
}

#[test]
fn every_size_may_have_a_fraction_or_a_unit_wherever_it_is_set() {
    let mut sizes = 0;
    for (key, value) in keys(&Config::default()) {
        let (section, name) = key.rsplit_once('.').unwrap_or(("", &key));
        let line = |value: &str| match section {
            "" => format!("{name} = {value}\n"),
            _ => format!("[{section}]\n{name} = {value}\n"),
        };
        let with = |value: &str| {
            let (_dir, path) = file(&line(value));
            load(&Sources { file: Some(path), ..Sources::default() })
        };
        if !key.ends_with("_gb") {
            let is_text = matches!(value, toml::Value::String(_));
            assert!(is_text || with("\"200 MB\"").is_err(), "{key} is a size: its name has to end in _gb");
            continue;
        }
        sizes += 1;
        for (value, words, shown) in [
            ("0.2", "0.2", "\"200 MB\""),
            ("\"200 MB\"", "200 MB", "\"200 MB\""),
            ("\"1.5 TB\"", "1.5 TB", "1500"),
        ] {
            let from_file = with(value).unwrap();
            let variable = env(&[(&variable_of(&key), words)]);
            let from_env = load(&Sources { env: variable, ..Sources::default() }).unwrap();
            assert_eq!(from_file.config, from_env.config, "{key} = {value}");
            let text = show(&from_file, &Settings::new(&from_file, &machine()).unwrap());
            assert!(format!("\n{text}").contains(&format!("\n{name} = {shown}  # ")), "{text}");
            let again: Config = toml::from_str(&text).unwrap();
            let value_of = |config: &Config| keys(config).into_iter().find(|(other, _)| *other == key);
            assert_eq!(value_of(&again), value_of(&from_file.config), "{text}");
        }
        for nonsense in ["-0.5", "nan", "\"0.5\"", "\"5 XB\"", "1e12", "true", "[1]"] {
            assert!(with(nonsense).is_err(), "{key} = {nonsense}");
        }
        let (tiny, bound) = match key.as_str() {
            "cache.compress_min_size_gb" => ("\"10 kB\"", "at least 64 KiB"),
            _ => ("\"999 kB\"", "between 1 MB and"),
        };
        let problem = Settings::new(&with(tiny).unwrap(), &machine()).unwrap_err().to_string();
        assert!(problem.contains(&format!("{key} = {tiny} (")) && problem.contains(bound), "{problem}");
    }
    assert!(sizes >= 6, "{sizes}");
    let settings = check("max_size_gb = \"200 MB\"\n[cache]\nmax_blob_size_gb = 0.1\n").unwrap();
    assert_eq!((settings.max_size_bytes, settings.max_blob_bytes), (200_000_000, 100_000_000));
}
