//! The flags with which all client commands connect to a server.
//!
//! Secrets do not belong on a command line, which every user of a machine can read: a header can come from a file
//! (`--header @FILE`), from the environment (`GOREGO_HEADERS`), or from a credential helper.

use clap::Args;
use gorego_client::ConnectOptions;
use gorego_reapi::error::{Error, Result};
use std::{
    env,
    path::{Path, PathBuf},
};

/// The variable with headers, one `NAME=VALUE` in each line.
const HEADERS_VARIABLE: &str = "GOREGO_HEADERS";

/// The heading of these flags in help texts. It is set for each of them, because `next_help_heading` would also apply
/// to the flags that follow this struct in a subcommand.
const HEADING: &str = "Connection";

/// Flags for TLS and credentials.
#[derive(Debug, Clone, Default, Args)]
pub struct ConnectArgs {
    /// CA certificates to trust, in PEM [default: the CA certificates of this machine]
    #[arg(long, value_name = "FILE", help_heading = HEADING)]
    pub tls_ca: Option<PathBuf>,
    /// Client certificate, in PEM
    #[arg(long, value_name = "FILE", requires = "tls_key", help_heading = HEADING)]
    pub tls_cert: Option<PathBuf>,
    /// Private key of that certificate, in PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert", help_heading = HEADING)]
    pub tls_key: Option<PathBuf>,
    /// Send this header with every request, or the headers of a file with one NAME=VALUE per line (repeatable). Other
    /// users can read command lines, so put secrets into a file, or into GOREGO_HEADERS, which has the format of the
    /// file
    #[arg(long, value_name = "NAME=VALUE|@FILE", help_heading = HEADING)]
    pub header: Vec<String>,
    /// Get headers from this program, which speaks the protocol of Bazel's --credential_helper
    #[arg(long, env = "GOREGO_CREDENTIAL_HELPER", value_name = "PROGRAM", help_heading = HEADING)]
    pub credential_helper: Option<PathBuf>,
}

impl ConnectArgs {
    /// Whether the command line has any of these flags. A credential helper may come from the environment.
    pub(super) fn has_flags(&self) -> bool {
        self.tls_ca.is_some() || self.tls_cert.is_some() || !self.header.is_empty()
    }

    /// The options for a connection to this endpoint. Reads the header files.
    ///
    /// # Errors
    /// `Invalid` for headers that are malformed or cannot be read.
    pub(super) fn options(&self, endpoint: &str) -> Result<ConnectOptions> {
        let of_environment = match env::var(HEADERS_VARIABLE) {
            Ok(text) => text,
            Err(env::VarError::NotPresent) => String::new(),
            Err(env::VarError::NotUnicode(_)) => {
                return Err(Error::Invalid(format!("{HEADERS_VARIABLE} is not UTF-8 text")));
            }
        };
        self.options_with(endpoint, &of_environment)
    }

    fn options_with(&self, endpoint: &str, of_environment: &str) -> Result<ConnectOptions> {
        let mut options = ConnectOptions {
            tls_ca: self.tls_ca.clone(),
            identity: self.tls_cert.clone().zip(self.tls_key.clone()),
            credential_helper: self.credential_helper.clone(),
            ..endpoint.into()
        };
        for header in &self.header {
            match (header.strip_prefix('@'), header.split_once('=')) {
                (Some(file), _) => options.add_headers_of_file(Path::new(file))?,
                (None, Some((name, value))) => options.add_header(name, value)?,
                (None, None) => return Err(Error::invalid("--header: expected NAME=VALUE or @FILE")),
            }
        }
        let flags = std::mem::take(&mut options.headers);
        let named = |problem: Error| Error::Invalid(format!("{HEADERS_VARIABLE}: {problem}"));
        options.add_headers(of_environment).map_err(named)?;
        // A flag replaces a header of the same name from the environment.
        let names: Vec<_> = flags.keys().cloned().collect();
        names.iter().for_each(|name| drop(options.headers.remove(name)));
        options.headers.extend(flags);
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_come_from_flags_files_and_the_environment_and_flags_come_first() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "x-file=1\n").unwrap();
        let header = vec![
            "authorization=Bearer flag".into(),
            "x-two=a".into(),
            "x-two=b".into(),
            format!("@{}", file.path().display()),
        ];
        let args = ConnectArgs { header, ..ConnectArgs::default() };
        let options = args.options_with("grpc://a:1", "authorization=Bearer env\nx-env=1").unwrap();
        let values = |name: &str| -> Vec<_> {
            options.headers.get_all(name).iter().map(|value| value.to_str().unwrap().to_owned()).collect()
        };
        assert_eq!(values("authorization"), ["Bearer flag"]);
        assert_eq!(values("x-two"), ["a", "b"]);
        assert_eq!((values("x-file"), values("x-env")), (vec!["1".into()], vec!["1".into()]));
        for (header, environment, hint) in [
            ("s3cret", "", "NAME=VALUE or @FILE"),
            ("@/no/such/file", "", "/no/such/file"),
            ("x=1", "s3cret", "GOREGO_HEADERS: line 1"),
        ] {
            let args = ConnectArgs { header: vec![header.into()], ..ConnectArgs::default() };
            let error = args.options_with("grpc://a:1", environment).unwrap_err().to_string();
            assert!(error.contains(hint) && !error.contains("s3cret"), "{error}");
        }
    }
}
