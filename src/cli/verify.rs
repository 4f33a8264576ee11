//! `gorego verify`: runs the conformance suite against a server and prints the report.

use super::{
    VerifyArgs,
    output::{Printout, finish, print},
};
use gorego_reapi::error::{Error, Result};
use gorego_verify::{self as verify, Options, Selection, groups, rules};
use std::{
    fmt::Write as _,
    fs::File,
    io::{self, Write as _},
    path::Path,
};

/// Verifies a server, or lists the checks. Returns the exit code.
pub(super) fn run(args: &VerifyArgs) -> u8 {
    let outcome = if args.list { selection(args).map(|chosen| list(&chosen)) } else { verify(args) };
    finish(outcome)
}

fn verify(args: &VerifyArgs) -> Result<Printout> {
    let options = options(args)?;
    // The file is opened before the run, so that an unwritable file is reported at once and not after minutes.
    let open = |path| File::create(path).map(|file| (path, file)).map_err(unwritable(path));
    let junit = args.junit.as_deref().map(open).transpose()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Error::io("start the threads of a client", &error))?;
    let report = runtime.block_on(verify::run(options))?;
    let text = if args.json { report.json(args.strict) + "\n" } else { report.table(args.strict) };
    if let Some((path, mut file)) = junit {
        let xml = report.junit(args.strict)?;
        // The result is still printed.
        if let Err(error) = file.write_all(xml.as_bytes()) {
            print(&text)?;
            return Err(unwritable(path)(error));
        }
    }
    Ok((text, report.is_good(args.strict)))
}

fn unwritable(path: &Path) -> impl Fn(io::Error) -> Error {
    move |error| Error::Invalid(format!("could not write {}: {error}", path.display()))
}

fn options(args: &VerifyArgs) -> Result<Options> {
    Ok(Options {
        instance: args.instance.clone(),
        other_instance: args.other_instance.clone(),
        digest_function: args.digest_function.clone(),
        platform: args.platform.clone(),
        asset_origin: args.asset_origin.clone(),
        check_limit: args.timeout,
        jobs: args.jobs.get(),
        selection: selection(args)?,
        large: args.large,
        ..Options::new(args.connect.options(&args.endpoint)?)
    })
}

fn selection(args: &VerifyArgs) -> Result<Selection> {
    let only: Vec<String> = args.only.iter().map(|name| name.trim().to_uppercase()).collect();
    for name in &only {
        let known = rules::find(name).is_some() || rules::ALL.iter().any(|(group, _)| group == name);
        if !known {
            let name = name.escape_debug();
            return Err(Error::Invalid(format!("--only {name}: no such rule or group; see --list")));
        }
    }
    Ok(Selection { only, level: args.level })
}

/// Lists every selected rule with its id, level and title, and its checks or the reason why it has none.
fn list(selection: &Selection) -> Printout {
    let mut text = String::new();
    for group in groups::ALL {
        for rule in group.rules.iter().filter(|rule| selection.includes(&[rule.id])) {
            let _ = writeln!(text, "{:<7} {:<7} {}", rule.id, rule.level, rule.title);
            let checks = groups::ALL.iter().flat_map(groups::Group::checks);
            for check in checks.filter(|check| check.rules.contains(&rule.id)) {
                let _ = writeln!(text, "{:16}- {}", "", check.title());
            }
            for (_, reason) in group.beyond().filter(|(beyond, _)| beyond.id == rule.id) {
                let _ = writeln!(text, "{:16}skipped: {reason}", "");
            }
        }
    }
    (text, true)
}
