//! Cases as a table, and how they are run.

use std::collections::{BTreeMap, BTreeSet};

use super::peer::{Expect, Peer};

/// A part of what a client does.
#[derive(Debug, Clone)]
pub enum Step {
    Send(Vec<u8>),
    Wait(Expect),
}

/// Bytes, of one frame or several.
pub fn send(bytes: impl Into<Vec<u8>>) -> Step {
    Step::Send(bytes.into())
}

pub fn wait(expect: Expect) -> Step {
    Step::Wait(expect)
}

/// What a client does, on a connection of its own, and what must come of it.
#[derive(Debug, Clone)]
pub struct Case {
    /// Section and number.
    pub id: &'static str,
    pub about: &'static str,
    /// Whether the connection has begun already.
    pub is_begun: bool,
    pub steps: Vec<Step>,
    pub expect: Expect,
}

pub fn case(
    id: &'static str,
    about: &'static str,
    steps: impl Into<Vec<Step>>,
    expect: Expect,
) -> Case {
    Case { id, about, is_begun: true, steps: steps.into(), expect }
}

impl Case {
    /// From the connection's first byte on.
    pub fn raw(mut self) -> Self {
        self.is_begun = false;
        self
    }

    async fn run(&self, peer: &mut Peer) -> Result<(), String> {
        if self.is_begun {
            peer.handshake(&[]).await?;
        }
        for step in &self.steps {
            match step {
                Step::Send(bytes) => peer.send(bytes).await,
                Step::Wait(expect) => peer.expect(expect).await?,
            }
        }
        peer.expect(&self.expect).await
    }
}

/// Cases that are answered in another way than the suite wants.
#[derive(Debug)]
pub struct Exception {
    pub ids: &'static [&'static str],
    /// What comes. If it changes, the exception is to be looked at again.
    pub comes: Expect,
    /// Why that is allowed or harmless.
    pub why: &'static str,
}

/// Runs all cases at the same time, each over a connection of its own.
pub async fn run(
    cases: Vec<Case>,
    exceptions: &'static [Exception],
    connect: impl AsyncFn() -> Peer,
) {
    let of = |it: &'static Exception| it.ids.iter().map(move |id| (*id, it));
    let mut exceptions: BTreeMap<_, _> = exceptions.iter().flat_map(of).collect();
    let mut ids = BTreeSet::new();
    let mut running = Vec::new();
    for mut case in cases {
        assert!(ids.insert(case.id), "{} is there twice", case.id);
        let exception = exceptions.remove(case.id);
        if let Some(exception) = exception {
            assert_ne!(exception.comes, case.expect);
            case.expect = exception.comes.clone();
        }
        let connect = &connect;
        running.push(async move {
            let ended = case.run(&mut connect().await).await;
            let why = exception.map_or("", |it| it.why);
            ended.err().map(|error| format!("{} {}: {error} {why}", case.id, case.about))
        });
    }
    assert!(exceptions.is_empty(), "no such cases: {exceptions:?}");
    let failed: Vec<_> = futures::future::join_all(running).await.into_iter().flatten().collect();
    assert!(failed.is_empty(), "{} cases failed:\n{}", failed.len(), failed.join("\n"));
}
