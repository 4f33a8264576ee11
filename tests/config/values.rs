//! Values of the wrong type or form: all are reported in one run, in words.

use super::{env, file, machine};
use gorego::config::{Flag, Sources, load, load_checked};
use toml::Value;

/// The error of a file, from the start of the message of its only problem to the end of the line.
fn problem(text: &str) -> String {
    let (_dir, path) = file(text);
    let error = load(&Sources { file: Some(path), ..Sources::default() }).unwrap_err().to_string();
    assert_eq!(error.matches("c.toml:").count(), 1, "one problem: {error}");
    let (_, message) = error.split_once("c.toml:").unwrap();
    message.lines().next().unwrap().to_owned()
}

#[test]
fn a_value_of_the_wrong_type_is_explained_in_words_with_its_key_and_place() {
    for (text, expected) in [
        (
            "[execution]\nqueue_size = \"many\"",
            "2:14: execution.queue_size has to be a whole number of 0 or more, and the text \"many\" is not",
        ),
        (
            "[execution]\nqueue_size = \"20\"",
            "2:14: execution.queue_size has to be a whole number of 0 or more, and the text \"20\" is not; \
             write 20 without quotes",
        ),
        (
            "[execution]\nqueue_size = -1",
            "2:14: execution.queue_size has to be a whole number of 0 or more, and -1 is not",
        ),
        (
            "[execution]\nmax_attempts = 5000000000",
            "2:16: execution.max_attempts has to be a whole number from 0 to 4294967295, and 5000000000 is not",
        ),
        (
            "[cache]\nscrub_mb_per_second = 1.5",
            "2:23: cache.scrub_mb_per_second has to be a whole number from 0 to 4294967295 (MB per second), and 1.5 is not",
        ),
        (
            "allow_unauthenticated = \"true\"",
            "1:25: allow_unauthenticated has to be true or false, and the text \"true\" is not; \
             write true without quotes",
        ),
        ("node_name = 3", "1:13: node_name has to be text in quotes, and 3 is not; write \"3\""),
        (
            "shutdown_grace = 30",
            "1:18: shutdown_grace has to be a time with a unit, such as \"30s\", \"10m\" or \"12h\", \
             and 30 is not; write \"30s\" for seconds",
        ),
        (
            "instance_names = \"main\"",
            "1:18: instance_names has to be a list, such as [\"a\", \"b\"], and the text \"main\" is not; \
             write [\"main\"]",
        ),
        (
            "instance_names = [\"a\", 2]",
            "1:24: instance_names has to be text in quotes, and 2 is not; write \"2\"",
        ),
        (
            "[log]\nformat = \"xml\"",
            "2:10: log.format has to be one of \"auto\", \"json\", \"text\", and the text \"xml\" is not",
        ),
        ("max_size_gb = true", "1:15: max_size_gb has to be a size: "),
        ("[execution]\npools = 1", "2:9: execution.pools has to be a table of keys and values, and 1 is not"),
        (
            "[execution.pools.a]\nslots = \"two\"",
            "2:9: execution.pools.a.slots has to be a whole number of 0 or more, and the text \"two\" is not",
        ),
        (
            "[instances.little]\nexecution = 0",
            "2:13: instances.little.execution has to be true or false, and 0 is not",
        ),
        (
            "[instances.little]\nexecutions = true",
            "2:1: unknown key \"instances.little.executions\"; did you mean \"instances.little.execution\"?",
        ),
        (
            "[[access.jwt]]\nleeway = 5\nissuer = \"https://a\"",
            "2:10: access.jwt.leeway has to be a time with a unit, such as",
        ),
    ] {
        let problem = problem(text);
        assert!(problem.starts_with(expected), "{problem}\nfor {text}");
    }
}

#[test]
fn a_key_that_is_missing_in_one_entry_of_a_list_is_reported_beside_the_problem_of_another() {
    let error = super::file_error(
        "[[access.certificates]]\nname = \"a\"\n[[access.certificates]]\nname = 5\nroles = [\"admin\", 7]\n",
    );
    for part in [
        "c.toml:1:1: access.certificates needs the key \"roles\"",
        "c.toml:4:8: access.certificates.name has to be text in quotes, and 5 is not",
        "c.toml:5:19: access.certificates.roles has to be text in quotes, and 7 is not",
    ] {
        assert!(error.contains(part), "{part} in {error}");
    }
    assert_eq!(error.matches("c.toml:").count(), 3, "{error}");
}

/// No message of serde comes through.
fn assert_in_words(error: &str) {
    for word in ["u16", "u32", "u64", "usize", "i32", "i64", "struct", "invalid", "variant", "expected", "`"]
    {
        assert!(!error.contains(word), "{word} in {error}");
    }
}

#[test]
fn all_values_that_cannot_be_used_are_reported_in_one_run() {
    let (_dir, path) = file(
        "max_size_gb = true\ninstance_names = [1, 2]\nlisten_adr = \"x\"\nshutdown_grace = \"soon\"\n\
         [execution]\nqueue_size = \"many\"\nmax_attempts = 0\ndefault_timeout = 5\nmax_timeout = \"10m\"\n\
         [execution.pools.a]\nslots = \"two\"\nslot = 2\nproperties = { arch = [], cores = { minimum = \"x\" } }\n\
         [execution.pools.b]\ncores = []\n",
    );
    let env = env(&[
        ("GOREGO_EXECUTION__CONCURRENCY", "all"),
        ("GOREGO_NOTHING", "x"),
        ("GOREGO_LOG__FORMAT", "xml"),
    ]);
    let flags = vec![Flag { flag: "--some-flag", key: "assets.max_redirects", value: Value::Boolean(true) }];
    let sources = Sources { file: Some(path), env, flags, ..Sources::default() };
    let error = load_checked(&sources, &machine()).unwrap_err().to_string();
    let mut rest = &*error;
    for part in [
        "c.toml:1:15: max_size_gb has",
        "c.toml:2:19: instance_names has to be text in quotes, and 1 ",
        "c.toml:2:22: instance_names has to be text in quotes, and 2 ",
        "c.toml:3:1: unknown key \"listen_adr\"",
        "c.toml:4:18: shutdown_grace",
        "c.toml:6:14: execution.queue_size has",
        "c.toml:8:19: execution.default_timeout has",
        "c.toml:11:9: execution.pools.a.slots has",
        "c.toml:12:1: unknown key \"execution.pools.a.slot\"",
        "c.toml:13:",
        "execution.pools.a.properties.arch: an empty list",
        "execution.pools.a.properties.cores.minimum has to be",
        "c.toml:15:9: execution.pools.b.cores has",
        "GOREGO_EXECUTION__CONCURRENCY=\"all\": ",
        "unknown environment variable GOREGO_NOTHING",
        "GOREGO_LOG__FORMAT=\"xml\": log.format has to be one of",
        "--some-flag: assets.max_redirects has to be a whole number",
        // What the range of a value allows is in the same report.
        "execution.max_attempts = 0 (",
    ] {
        let at = rest.find(part).unwrap_or_else(|| panic!("{part} is missing or out of order in {error}"));
        rest = &rest[at + part.len()..];
    }
    assert_in_words(&error);
}

/// The default of a key whose value could not be read is not what is configured, so no other value is compared with it.
#[test]
fn a_value_that_cannot_be_read_causes_no_problem_of_another_key() {
    let execution = |rest: &str| format!("[execution]\n{rest}");
    for text in [
        "listen_addr = \"0.0.0.0:1\"\nallow_unauthenticated = \"true\"",
        "listen_addr = \"0.0.0.0:1\"\n[tls]\ncert = 1\nkey = \"k\"\n[access]\ntokens = \"t\"",
        "listen_addr = \"0.0.0.0:1\"\n[tls]\ncert = \"c\"\nkey = \"k\"\n[access]\ntokens = 1",
        "listen_addr = 1\n[http]\nlisten_addr = \"127.0.0.1:50051\"",
        "[http]\nlisten_addr = \"0.0.0.0:1\"\n[access]\njwt = 1\n[tls]\ncert = \"c\"\nkey = \"k\"",
        "[tls]\ncert = \"c\"\nkey = \"k\"\nclient_ca = 1\ncrl = \"r\"\nclient_auth = \"optional\"\n\
         [[access.certificates]]\nname = \"ci\"\nroles = [\"admin\"]",
        "instance_names = \"main\"\n[instances.ci]\nblobs_of = \"main\"",
        "instance_names = []\ninstances = 1",
        "[access]\nanonymous = [\"own\"]\nroles = 1",
        "local_cache_dir = 1\n[execution.sandbox]\nrootfs = \"/home\"",
        "local_cache_dir = 1\n[execution.pools.a]\nslots = 1\nsandbox = { rootfs = \"/home\" }",
        &execution("max_timeout = 24\ndefault_timeout = \"400h\""),
        &execution("max_timeout = \"1s\"\ndefault_timeout = 1"),
        &execution("pools = 1\nsandbox = { mode = \"off\" }\nimages = { registries = [\"r.example.com\"] }"),
    ] {
        let (_dir, path) = file(text);
        let sources = Sources { file: Some(path), ..Sources::default() };
        let error = load_checked(&sources, &machine()).unwrap_err().to_string();
        assert_eq!(error.matches("c.toml:").count(), 1, "{error}\nfor {text}");
        assert!(!error.contains("cannot be used"), "{error}\nfor {text}");
    }
}
