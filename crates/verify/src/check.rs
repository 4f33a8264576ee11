//! A check, what can come of it, and the words in which a check says what it expects.
//!
//! A check is an async function from a [`Session`] to a [`Verdict`]: `Ok(())` passes, and `?` on any of the helpers below
//! ends it with the reason. A check of a refusal first shows that the good form is accepted; otherwise it would pass against
//! a server that does nothing.
//!
//! A failure is about the check's own rules. Where a step that only leads there does not succeed, the check says so with
//! [`Answer::control`] and [`Step::control`], or with [`Answer::needs`] and [`Step::needs`] where another rule, with a check of its
//! own, asks for that step. Helpers that many checks share name the rule that they stand on, and a check of that very rule fails
//! by it. So one fault is one failure, and never one in every check that came past it.

use super::{rules, rules::Level, session::Session};
use futures::future::BoxFuture;
use gorego_reapi::proto::rpc;
use std::fmt::{Debug, Display};
use tonic::{Code, Status};

/// How much of a value or message a report repeats, in characters.
const SHOWN_CHARS: usize = 300;

/// What a check comes to; the value is for checks in several steps.
pub type Verdict<T = ()> = Result<T, Stop>;

/// Why a check ends before it could pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// The server does otherwise.
    Fail {
        /// What the rule asks for.
        expected: String,
        /// What the server did.
        observed: String,
    },
    /// A step before the rule's own matter did not succeed, so nothing can be said about the rule.
    Unmet {
        /// The rule that asks for this step, if it is one with a check of its own.
        needs: Option<&'static str>,
        /// What the step needed.
        expected: String,
        /// What the server did.
        observed: String,
    },
    /// The server does not claim the feature, or answers UNIMPLEMENTED where it may.
    Absent(String),
    /// It cannot be tested here; the reason says what would be needed.
    Skipped(String),
}

/// One check, registered by [`checks!`](crate::checks).
pub struct Check {
    /// A sentence about the server, as an identifier.
    pub name: &'static str,
    /// Ids of the rules that it serves; the first one decides where it is shown.
    pub rules: &'static [&'static str],
    /// The check itself.
    pub run: fn(Session) -> BoxFuture<'static, Verdict>,
}

impl Check {
    /// The sentence.
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

/// The checks of a file: `checks![name_of_the_function => "RULE-01", "RULE-02"; ...]`.
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

/// A failure.
pub fn fail(expected: impl Display, observed: impl Display) -> Stop {
    Stop::Fail { expected: expected.to_string(), observed: shorten(&observed.to_string()) }
}

/// The server does not have this, and need not.
pub fn absent(why: impl Display) -> Stop {
    Stop::Absent(why.to_string())
}

/// This cannot be tested here.
pub fn skipped(why: impl Display) -> Stop {
    Stop::Skipped(why.to_string())
}

/// Goes on only if the condition holds.
///
/// # Errors
/// A failure otherwise.
pub fn ensure(condition: bool, expected: impl Display, observed: impl Display) -> Verdict {
    if condition { Ok(()) } else { Err(fail(expected, observed)) }
}

/// Goes on only if both are equal; `what` names the thing.
///
/// # Errors
/// A failure otherwise.
pub fn equal<T: PartialEq + Debug>(what: &str, observed: &T, expected: &T) -> Verdict {
    let say = |value: &T| shorten(&format!("{what} {value:?}"));
    ensure(observed == expected, say(expected), say(observed))
}

/// What a failed step says of the rule that is checked.
pub trait Step<T>: Sized {
    /// The step is a positive control: where it fails, the check is inconclusive.
    ///
    /// # Errors
    /// Unmet for a failure.
    fn control(self) -> Verdict<T>;

    /// The step is the matter of that rule: where it fails, the check is skipped if that rule fails in the same run, and
    /// inconclusive if not.
    ///
    /// # Errors
    /// Unmet for a failure.
    fn needs(self, rule: &'static str) -> Verdict<T>;

    /// The step is the matter of this check, whatever its helper says.
    ///
    /// # Errors
    /// A failure for what was unmet.
    fn own(self) -> Verdict<T>;

    /// Says in which of several cases a failure happened.
    ///
    /// # Errors
    /// The same, named.
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
    /// A failure as one of a step; anything else as it is.
    fn unmet(self, needs: Option<&'static str>) -> Self {
        match self {
            Self::Fail { expected, observed } => Self::Unmet { needs, expected, observed },
            other => other,
        }
    }
}

/// What the server answered, against what it should have.
pub trait Answer<T> {
    /// The value of an answer that has to be OK; `what` is a sentence: "the upload is accepted".
    ///
    /// # Errors
    /// A failure otherwise.
    fn wanted(self, what: &str) -> Verdict<T>;

    /// The same for a positive control.
    ///
    /// # Errors
    /// As [`Step::control`].
    fn control(self, what: &str) -> Verdict<T>;

    /// The same for a call that is the matter of that rule.
    ///
    /// # Errors
    /// As [`Step::needs`].
    fn needs(self, rule: &'static str, what: &str) -> Verdict<T>;

    /// The same for a call that a server need not have: UNIMPLEMENTED means that the feature is absent.
    ///
    /// # Errors
    /// Absent, or a failure.
    fn offered(self, what: &str) -> Verdict<T>;

    /// The status of a call that has to fail with one of these codes; `what` names the thing that is refused.
    ///
    /// # Errors
    /// A failure when it is OK or has another code.
    fn refused(self, what: &str, codes: &[Code]) -> Verdict<Status>;

    /// The value of an answer that may be OK or fail with one of these codes, which is `None`: where either the call or an
    /// entry of its answer may bear the error.
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

/// The same for a status inside a message; an absent one means OK.
///
/// # Errors
/// A failure when the code is none of these; `Code::Ok` among them accepts success.
pub fn inline(what: &str, status: Option<&rpc::Status>, codes: &[Code]) -> Verdict {
    let code = status.map_or(0, |status| status.code);
    let seen = || status.map_or_else(|| "no status".to_owned(), show_inline);
    ensure(codes.iter().any(|wanted| *wanted as i32 == code), format!("{what}: {}", names(codes)), seen())
}

/// `NAME: message`, and the cause where it is of this side's connection.
pub fn show(status: &Status) -> String {
    let cause = std::error::Error::source(status).map(|error| format!(" ({})", innermost(error)));
    let name = code_name(status.code() as i32);
    shorten(&format!("{name}: {}{}", status.message(), cause.unwrap_or_default()))
}

/// The cause at the bottom; the layers above it say only "transport error".
pub fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    std::iter::successors(Some(error), |error| error.source()).last().unwrap_or(error).to_string()
}

/// `NAME: message` of a status inside a message.
pub fn show_inline(status: &rpc::Status) -> String {
    shorten(&format!("inline {}: {}", code_name(status.code), status.message))
}

/// The name of a code as the gRPC documentation writes it.
pub fn code_name(code: i32) -> String {
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
