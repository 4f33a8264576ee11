//! Checks, their verdicts, and the helpers with which a check states what it expects.
//!
//! A check is an async function from a [`Session`] to a [`Verdict`]: `Ok(())` passes, and `?` on any of the helpers
//! below ends it with the reason. A check of a refusal first shows that the valid form is accepted. Otherwise it would
//! pass against a server that does nothing.
//!
//! A failure concerns the check's own rules. If a preparatory step fails, the check says so with [`Answer::control`]
//! and [`Step::control`], or with [`Answer::needs`] and [`Step::needs`] if another rule with its own check requires
//! that step. Helpers that many checks share name the rule that they depend on; in a check of that rule, their failure
//! is the check's own. So one fault causes one failure, and not one in every check that depends on it.

use super::{rules, rules::Level, session::Session};
use futures::future::BoxFuture;
use gorego_reapi::proto::rpc;
use std::fmt::{Debug, Display};
use tonic::{Code, Status};

/// Number of characters of a value or message that a report repeats.
const SHOWN_CHARS: usize = 300;

/// The result of a check. The value is for checks with several steps.
pub(crate) type Verdict<T = ()> = Result<T, Stop>;

/// The reason why a check ends without passing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// The server violates the rule.
    Fail { expected: String, observed: String },
    /// A preparatory step failed, so nothing can be said about the rule.
    Unmet {
        /// The rule that requires this step, if it has its own check.
        needs: Option<&'static str>,
        /// What the step expected.
        expected: String,
        observed: String,
    },
    /// The server does not claim the feature, or answers UNIMPLEMENTED where it may.
    Absent(String),
    /// It cannot be tested here. The text says what would be needed.
    Skipped(String),
}

/// A check, registered by [`checks!`](crate::checks).
pub struct Check {
    /// The name of the function: a sentence about the server in snake case.
    pub name: &'static str,
    /// The ids of the rules that it covers. The first one decides the group in the report.
    pub rules: &'static [&'static str],
    /// The function that runs the check.
    pub run: fn(Session) -> BoxFuture<'static, Verdict>,
}

impl Check {
    /// The name as a sentence.
    pub fn title(&self) -> String {
        self.name.replace('_', " ")
    }

    /// The highest level among its rules.
    pub fn level(&self) -> Level {
        let levels = self.rules.iter().filter_map(|id| rules::find(id)).map(|rule| rule.level);
        levels.max().unwrap_or(Level::May)
    }
}

impl Debug for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Check").field("name", &self.name).field("rules", &self.rules).finish_non_exhaustive()
    }
}

/// Lists the checks of a file: `checks![name_of_the_function => "RULE-01", "RULE-02"; ...]`.
#[macro_export]
macro_rules! checks {
    ($($name:ident => $($rule:literal),+);+ $(;)?) => {
        &[$($crate::check::Check {
            name: stringify!($name),
            rules: &[$($rule),+],
            run: |session| Box::pin($name(session)),
        }),+]
    };
}

pub(crate) fn fail(expected: impl Display, observed: impl Display) -> Stop {
    Stop::Fail { expected: expected.to_string(), observed: shorten(&observed.to_string()) }
}

/// The server lacks an optional feature.
pub(crate) fn absent(why: impl Display) -> Stop {
    Stop::Absent(why.to_string())
}

/// The check cannot be performed here.
pub(crate) fn skipped(why: impl Display) -> Stop {
    Stop::Skipped(why.to_string())
}

/// Passes if the condition holds.
///
/// # Errors
/// A failure otherwise.
pub(crate) fn ensure(condition: bool, expected: impl Display, observed: impl Display) -> Verdict {
    if condition { Ok(()) } else { Err(fail(expected, observed)) }
}

/// Passes if both values are equal; `what` names the value.
///
/// # Errors
/// A failure otherwise.
pub(crate) fn equal<T: PartialEq + Debug>(what: &str, observed: &T, expected: &T) -> Verdict {
    let say = |value: &T| shorten(&format!("{what} {value:?}"));
    ensure(observed == expected, say(expected), say(observed))
}

/// The meaning of a failed step for the rule that is checked.
pub(crate) trait Step<T>: Sized {
    /// The step is a positive control: if it fails, the check is inconclusive.
    ///
    /// # Errors
    /// Unmet for a failure.
    fn control(self) -> Verdict<T>;

    /// The step is the subject of another rule: if it fails, the check is skipped if that rule fails in the same run,
    /// and inconclusive otherwise.
    ///
    /// # Errors
    /// Unmet for a failure.
    fn needs(self, rule: &'static str) -> Verdict<T>;

    /// The step is the subject of this check, even if its helper says otherwise.
    ///
    /// # Errors
    /// A failure instead of `Unmet`.
    fn own(self) -> Verdict<T>;

    /// Adds the name of the case to a failure.
    ///
    /// # Errors
    /// The same failure with the name of the case.
    fn case(self, case: impl Display) -> Verdict<T>;
}

impl<T> Step<T> for Verdict<T> {
    fn control(self) -> Self {
        self.map_err(|stop| stop.unmet(None))
    }

    fn needs(self, rule: &'static str) -> Self {
        self.map_err(|stop| stop.unmet(Some(rule)))
    }

    fn own(self) -> Self {
        self.map_err(|stop| match stop {
            Stop::Unmet { expected, observed, .. } => Stop::Fail { expected, observed },
            other => other,
        })
    }

    fn case(self, case: impl Display) -> Self {
        self.map_err(|stop| match stop {
            Stop::Fail { expected, observed } => {
                Stop::Fail { expected: format!("{case}: {expected}"), observed }
            }
            Stop::Unmet { needs, expected, observed } => {
                Stop::Unmet { needs, expected: format!("{case}: {expected}"), observed }
            }
            other => other,
        })
    }
}

impl Stop {
    /// Converts a failure to `Unmet`. Other values stay as they are.
    fn unmet(self, needs: Option<&'static str>) -> Self {
        match self {
            Self::Fail { expected, observed } => Self::Unmet { needs, expected, observed },
            other => other,
        }
    }
}

/// The response of a server, compared with the expected one.
pub(crate) trait Answer<T> {
    /// The value of a response that must be OK; `what` is a sentence, such as "the upload is accepted".
    ///
    /// # Errors
    /// A failure otherwise.
    fn wanted(self, what: &str) -> Verdict<T>;

    /// Like [`Answer::wanted`], for a positive control.
    ///
    /// # Errors
    /// See [`Step::control`].
    fn control(self, what: &str) -> Verdict<T>;

    /// Like [`Answer::wanted`], for a call that is the subject of another rule.
    ///
    /// # Errors
    /// See [`Step::needs`].
    fn needs(self, rule: &'static str, what: &str) -> Verdict<T>;

    /// Like [`Answer::wanted`], for an optional call: UNIMPLEMENTED means that the feature is absent.
    ///
    /// # Errors
    /// Absent, or a failure.
    fn offered(self, what: &str) -> Verdict<T>;

    /// The status of a call that must fail with one of these codes; `what` names what is refused.
    ///
    /// # Errors
    /// A failure when it is OK or has another code.
    fn refused(self, what: &str, codes: &[Code]) -> Verdict<Status>;

    /// The value of a response that is OK, or `None` if it fails with one of these codes. For errors that may be
    /// reported for the call or for an entry of its response.
    ///
    /// # Errors
    /// A failure when it has another code.
    fn or_refused(self, what: &str, codes: &[Code]) -> Verdict<Option<T>>;
}

impl<T: Debug> Answer<T> for Result<T, Status> {
    fn wanted(self, what: &str) -> Verdict<T> {
        self.map_err(|status| fail(what, show(&status)))
    }

    fn control(self, what: &str) -> Verdict<T> {
        Step::control(self.wanted(what))
    }

    fn needs(self, rule: &'static str, what: &str) -> Verdict<T> {
        Step::needs(self.wanted(what), rule)
    }

    fn offered(self, what: &str) -> Verdict<T> {
        match self {
            Err(status) if status.code() == Code::Unimplemented => {
                Err(absent(format!("the server answers {}", show(&status))))
            }
            answer => answer.wanted(what),
        }
    }

    fn refused(self, what: &str, codes: &[Code]) -> Verdict<Status> {
        let expected = || format!("{what} is refused with {}", names(codes));
        match self {
            Err(status) if codes.contains(&status.code()) => Ok(status),
            Err(status) => Err(fail(expected(), show(&status))),
            Ok(answer) => Err(fail(expected(), format!("OK: {answer:?}"))),
        }
    }

    fn or_refused(self, what: &str, codes: &[Code]) -> Verdict<Option<T>> {
        match self {
            Ok(answer) => Ok(Some(answer)),
            Err(status) if codes.contains(&status.code()) => Ok(None),
            Err(status) => Err(fail(format!("{what}: OK or {}", names(codes)), show(&status))),
        }
    }
}

/// Checks a status inside a message; an absent one means OK.
///
/// # Errors
/// A failure when its code is not among `codes`, which may include `Code::Ok`.
pub(crate) fn inline(what: &str, status: Option<&rpc::Status>, codes: &[Code]) -> Verdict {
    let code = status.map_or(0, |status| status.code);
    let seen = || status.map_or_else(|| "no status".to_owned(), show_inline);
    ensure(codes.iter().any(|wanted| *wanted as i32 == code), format!("{what}: {}", names(codes)), seen())
}

/// The response to the only entry of a batch.
///
/// # Errors
/// A failure if there is another number of responses.
pub(crate) fn only<T>(what: &str, responses: Vec<T>) -> Result<T, Stop> {
    let count = responses.len();
    let mut responses = responses.into_iter();
    match (responses.next(), responses.next()) {
        (Some(response), None) => Ok(response),
        _ => Err(fail(format!("{what}: one response"), format!("{count} responses"))),
    }
}

/// `NAME: message`, with the cause if it lies in the client's connection.
pub(crate) fn show(status: &Status) -> String {
    let cause = std::error::Error::source(status).map(|error| format!(" ({})", innermost(error)));
    let name = code_name(status.code() as i32);
    shorten(&format!("{name}: {}{}", status.message(), cause.unwrap_or_default()))
}

/// The innermost cause. The outer errors only say "transport error".
pub(crate) fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    std::iter::successors(Some(error), |error| error.source()).last().unwrap_or(error).to_string()
}

/// `NAME: message` for a status inside a message.
pub(crate) fn show_inline(status: &rpc::Status) -> String {
    shorten(&format!("inline {}: {}", code_name(status.code), status.message))
}

/// The name of a code as in the gRPC documentation.
pub(crate) fn code_name(code: i32) -> String {
    rpc::Code::try_from(code).map_or_else(|_| format!("code {code}"), |code| code.as_str_name().to_owned())
}

fn names(codes: &[Code]) -> String {
    codes.iter().map(|code| code_name(*code as i32)).collect::<Vec<_>>().join(" or ")
}

fn shorten(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{} ...", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_passes_only_with_a_code_that_the_rule_allows() {
        let answer = |code| Err::<(), _>(Status::new(code, "why"));
        let codes = [Code::InvalidArgument, Code::NotFound];
        assert!(answer(Code::NotFound).refused("x", &codes).is_ok());
        let Err(Stop::Fail { expected, observed }) = answer(Code::Internal).refused("an x", &codes) else {
            panic!("INTERNAL is no refusal");
        };
        assert_eq!(expected, "an x is refused with INVALID_ARGUMENT or NOT_FOUND");
        assert_eq!(observed, "INTERNAL: why");
        assert!(matches!(Ok::<_, Status>(7).refused("x", &codes), Err(Stop::Fail { .. })));
    }

    #[test]
    fn a_step_that_fails_is_no_failure_unless_it_is_the_checks_own_and_names_its_case() {
        let failed = || fail("x", "y");
        let unmet = |needs| Stop::Unmet { needs, expected: "x".into(), observed: "y".into() };
        let step = || Err::<(), _>(failed());
        assert_eq!(step().control(), Err(unmet(None)));
        assert_eq!(step().needs("EXE-03"), Err(unmet(Some("EXE-03"))));
        assert_eq!(step().needs("EXE-03").needs("EXE-07"), Err(unmet(Some("EXE-03"))), "the innermost rule");
        assert_eq!(step().needs("EXE-03").own(), Err(failed()));
        assert_eq!(step().case("the second"), Err(fail("the second: x", "y")));
        assert_eq!(Err::<(), _>(skipped("z")).control().case("a"), Err(skipped("z")));
        assert_eq!(Ok::<_, Stop>(7).control(), Ok(7));
    }

    #[test]
    fn unimplemented_is_absence_only_where_a_server_may_lack_the_call() {
        let answer = || Err::<(), _>(Status::unimplemented("no"));
        assert!(matches!(answer().offered("x works"), Err(Stop::Absent(_))));
        assert!(matches!(answer().wanted("x works"), Err(Stop::Fail { .. })));
    }
}
