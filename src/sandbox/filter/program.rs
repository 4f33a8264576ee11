//! [`Table`]: which system calls get which answer, and the BPF program by which the kernel finds that answer. Pure.
//!
//! When a program is installed, the kernel evaluates it once for each existing system call to learn which calls are
//! always allowed. Later it evaluates it for each use of the other calls. Both happen for every action, so the program
//! is a binary search over the call numbers.

use seccompiler::sock_filter;
use std::{collections::BTreeMap, ops::Range};

/// What the kernel does with a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Answer {
    Allow,
    /// The call fails with this errno. With 0 it returns 0 and has no effect.
    Errno(u16),
    EndProcess,
}

/// A test of one argument. All tests except `NotNull` look only at the lower 32 bits, as the kernel itself does with
/// these arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Test {
    Is(u32),
    IsNot(u32),
    HasAnyOf(u32),
    /// The bits under `mask` are equal to `value`.
    Masked {
        mask: u32,
        value: u32,
    },
    NotNull,
}

/// An answer, with tests of arguments that must all hold for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Case {
    /// Positions of arguments, counted from 0, with their tests.
    pub tests: Vec<(u8, Test)>,
    pub answer: Answer,
}

/// The answers to all system calls.
#[derive(Debug, Clone)]
pub(super) struct Table {
    /// The architecture of this program (`AUDIT_ARCH_*`). A call of another architecture kills its process.
    pub architecture: u32,
    /// The cases of each call number. The first case whose tests hold gives the answer. A call is allowed if no case
    /// does.
    pub calls: BTreeMap<u32, Vec<Case>>,
    /// Call numbers of another ABI, which kill the process.
    pub foreign: Range<u32>,
}

// Offsets in seccomp_data. Both architectures are little-endian.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const AND: u32 = libc::BPF_ALU | libc::BPF_AND | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
const JUMP: u32 = libc::BPF_JMP | libc::BPF_JA;
const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const IF_AT_LEAST: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
const IF_ANY_BIT: u32 = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;

/// Maximum distance of a conditional jump: 255, minus the two unconditional jumps that may be inserted in between.
const MAX_JUMP: usize = 253;

impl Table {
    /// Compiles the table into a program for the kernel.
    pub(super) fn assemble(&self) -> Vec<sock_filter> {
        let mut program = Assembly::default();
        let allow = program.answer(Answer::Allow);
        let end = program.answer(Answer::EndProcess);
        let mut found = BTreeMap::from([(0, allow)]);
        if !self.foreign.is_empty() {
            found.insert(self.foreign.start, end);
            found.insert(self.foreign.end, allow);
        }
        for (number, cases) in &self.calls {
            let label = program.cases(cases, allow);
            found.insert(*number, label);
            if let Some(next) = number.checked_add(1) {
                found.entry(next).or_insert(allow);
            }
        }
        let found: Vec<_> = found.into_iter().collect();
        let search = program.search(&found);
        let search = program.load(NUMBER, search);
        let start = program.branch(IF_EQUAL, self.architecture, search, end);
        program.load(ARCHITECTURE, start);
        program.finish()
    }
}

#[cfg(test)]
impl Table {
    /// The table's answer to a call.
    pub(super) fn answer(&self, architecture: u32, number: u32, arguments: &[u64; 6]) -> Answer {
        let holds = |(argument, test): &(u8, Test)| {
            let argument = arguments[usize::from(*argument)];
            let low = argument as u32;
            match *test {
                Test::Is(value) => low == value,
                Test::IsNot(value) => low != value,
                Test::HasAnyOf(bits) => low & bits != 0,
                Test::Masked { mask, value } => low & mask == value,
                Test::NotNull => argument != 0,
            }
        };
        if architecture != self.architecture || self.foreign.contains(&number) {
            return Answer::EndProcess;
        }
        let mut cases = self.calls.get(&number).into_iter().flatten();
        cases.find(|case| case.tests.iter().all(holds)).map_or(Answer::Allow, |case| case.answer)
    }
}

/// A position in a program: the number of instructions from there to the end.
type Label = usize;

/// A program that is written backwards from its end. Jumps only lead forward, so their targets are always known.
#[derive(Default)]
struct Assembly {
    reversed: Vec<sock_filter>,
    answers: BTreeMap<Answer, Label>,
}

impl Assembly {
    fn push(&mut self, code: u32, k: u32, jt: usize, jf: usize) -> Label {
        self.reversed.push(sock_filter { code: code as u16, jt: jt as u8, jf: jf as u8, k });
        self.reversed.len()
    }

    fn answer(&mut self, answer: Answer) -> Label {
        if let Some(label) = self.answers.get(&answer) {
            return *label;
        }
        let value = match answer {
            Answer::Allow => libc::SECCOMP_RET_ALLOW,
            Answer::Errno(errno) => libc::SECCOMP_RET_ERRNO | u32::from(errno),
            Answer::EndProcess => libc::SECCOMP_RET_KILL_PROCESS,
        };
        let label = self.push(RETURN, value, 0, 0);
        self.answers.insert(answer, label);
        label
    }

    /// Continues at `next`. Adds a jump unless `next` is the following instruction.
    fn go(&mut self, next: Label) {
        let distance = self.reversed.len() - next;
        if distance > 0 {
            self.push(JUMP, distance as u32, 0, 0);
        }
    }

    /// Loads a word of the call and continues at `next`.
    fn load(&mut self, offset: u32, next: Label) -> Label {
        self.go(next);
        self.push(LOAD, offset, 0, 0)
    }

    /// A label that leads to `target` and is close enough for a conditional jump.
    fn near(&mut self, target: Label) -> Label {
        if self.reversed.len() - target > MAX_JUMP {
            self.go(target);
            return self.reversed.len();
        }
        target
    }

    fn branch(&mut self, condition: u32, k: u32, holds: Label, fails: Label) -> Label {
        let holds = self.near(holds);
        let fails = self.near(fails);
        let length = self.reversed.len();
        self.push(condition, k, length - holds, length - fails)
    }

    fn cases(&mut self, cases: &[Case], otherwise: Label) -> Label {
        cases.iter().rev().fold(otherwise, |next, case| {
            let answer = self.answer(case.answer);
            case.tests.iter().rev().fold(answer, |holds, (argument, test)| {
                self.test(ARGUMENTS + 8 * u32::from(*argument), *test, holds, next)
            })
        })
    }

    fn test(&mut self, offset: u32, test: Test, holds: Label, fails: Label) -> Label {
        let tested = match test {
            Test::Is(value) => self.branch(IF_EQUAL, value, holds, fails),
            Test::IsNot(value) => self.branch(IF_EQUAL, value, fails, holds),
            Test::HasAnyOf(bits) => self.branch(IF_ANY_BIT, bits, holds, fails),
            Test::Masked { mask, value } => {
                let compared = self.branch(IF_EQUAL, value, holds, fails);
                self.go(compared);
                self.push(AND, mask, 0, 0)
            }
            Test::NotNull => {
                let upper = self.branch(IF_EQUAL, 0, fails, holds);
                let upper = self.load(offset + 4, upper);
                self.branch(IF_EQUAL, 0, upper, holds)
            }
        };
        self.load(offset, tested)
    }

    /// Finds the largest of these numbers that is not above the loaded one, and continues at its label.
    fn search(&mut self, numbers: &[(u32, Label)]) -> Label {
        match numbers {
            [] => self.reversed.len(),
            [(_, label)] => *label,
            _ if numbers.windows(2).all(|pair| pair[0].1 == pair[1].1) => numbers[0].1,
            _ => {
                let (lower, upper) = numbers.split_at(numbers.len() / 2);
                let holds = self.search(upper);
                let fails = self.search(lower);
                self.branch(IF_AT_LEAST, upper[0].0, holds, fails)
            }
        }
    }

    fn finish(mut self) -> Vec<sock_filter> {
        self.reversed.reverse();
        self.reversed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};

    /// A system call as the kernel presents it to the program.
    #[derive(Debug, Clone)]
    struct Call {
        architecture: u32,
        number: u32,
        arguments: [u64; 6],
    }

    impl Call {
        fn word(&self, offset: u32) -> u32 {
            match offset {
                NUMBER => self.number,
                ARCHITECTURE => self.architecture,
                _ => {
                    let argument = self.arguments[((offset - ARGUMENTS) / 8) as usize];
                    if offset.is_multiple_of(8) { argument as u32 } else { (argument >> 32) as u32 }
                }
            }
        }
    }

    /// Interprets the program as the kernel does and returns its result.
    fn run(program: &[sock_filter], call: &Call) -> u32 {
        let (mut at, mut loaded) = (0, 0);
        loop {
            let instruction = &program[at];
            let code = u32::from(instruction.code);
            at += 1;
            let condition = match code {
                RETURN => return instruction.k,
                LOAD => {
                    loaded = call.word(instruction.k);
                    continue;
                }
                AND => {
                    loaded &= instruction.k;
                    continue;
                }
                JUMP => {
                    at += instruction.k as usize;
                    continue;
                }
                IF_EQUAL => loaded == instruction.k,
                IF_AT_LEAST => loaded >= instruction.k,
                IF_ANY_BIT => loaded & instruction.k != 0,
                _ => panic!("unknown instruction {code}"),
            };
            at += usize::from(if condition { instruction.jt } else { instruction.jf });
        }
    }

    /// The table's answer as the value that a program returns.
    fn look_up(table: &Table, call: &Call) -> u32 {
        match table.answer(call.architecture, call.number, &call.arguments) {
            Answer::Allow => libc::SECCOMP_RET_ALLOW,
            Answer::Errno(errno) => libc::SECCOMP_RET_ERRNO | u32::from(errno),
            Answer::EndProcess => libc::SECCOMP_RET_KILL_PROCESS,
        }
    }

    fn any_answer() -> impl Strategy<Value = Answer> {
        prop_oneof![
            Just(Answer::Allow),
            (0u16..4).prop_map(Answer::Errno),
            (0u16..4095).prop_map(Answer::Errno),
            Just(Answer::EndProcess)
        ]
    }

    fn any_test() -> impl Strategy<Value = Test> {
        prop_oneof![
            (0u32..4).prop_map(Test::Is),
            (0u32..4).prop_map(Test::IsNot),
            (0u32..8).prop_map(Test::HasAnyOf),
            (0u32..8, 0u32..8).prop_map(|(mask, value)| Test::Masked { mask, value }),
            Just(Test::NotNull),
        ]
    }

    fn any_cases() -> impl Strategy<Value = Vec<Case>> {
        let case = (vec((0u8..6, any_test()), 0..3), any_answer());
        vec(case.prop_map(|(tests, answer)| Case { tests, answer }), 1..4)
    }

    fn any_table() -> impl Strategy<Value = Table> {
        proptest::collection::btree_map(0u32..600, any_cases(), 0..400).prop_map(|calls| Table {
            architecture: 7,
            calls,
            foreign: 0x4000_0000..u32::MAX,
        })
    }

    fn any_call() -> impl Strategy<Value = Call> {
        let number =
            prop_oneof![0u32..602, Just(0x3fff_ffff), Just(0x4000_0000), Just(u32::MAX - 1), Just(u32::MAX)];
        let argument = prop_oneof![0u64..8, Just(1 << 32), any::<u64>()];
        (prop_oneof![9 => Just(7u32), 1 => Just(8u32)], number, proptest::array::uniform6(argument))
            .prop_map(|(architecture, number, arguments)| Call { architecture, number, arguments })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_program_answers_as_the_table_does(table in any_table(), calls in vec(any_call(), 200)) {
            let program = table.assemble();
            for call in calls {
                prop_assert_eq!(run(&program, &call), look_up(&table, &call), "{:?}", call);
            }
        }
    }
}
