//! Many short requests from one host at once, and the verdict on each target: who answered, whom it saw, what failed.
use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::timeout;

use crate::binaries;
use crate::client::{Answer, Target};
use crate::topology::Lab;

/// A client's kernel that is told by ICMP inside connect() that nobody is there believes it only the second time, a second
/// later. Longer than that, and than a busy machine takes.
const PATIENCE: Duration = Duration::from_millis(2500);
const FIRST: usize = 3;
/// Datagrams of one flow.
const OF_A_FLOW: usize = 3;
const BATCH: usize = 16;
/// Requests that may be on their way at once where they are answered.
const AT_ONCE: usize = 24;

/// Asked of a host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Question {
    /// As the client's: http://ADDRESS:PORT/PATH or udp://ADDRESS:PORT.
    pub target: String,
    /// From which ports. Where it is one, all datagrams are one flow; other ranges must be in the host's own for
    /// local ports (net.ipv4.ip_local_port_range).
    pub source_ports: RangeInclusive<u16>,
}

/// What became of the requests to one target.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Answers {
    /// Whom each backend that answered saw.
    pub answered: BTreeMap<String, BTreeSet<IpAddr>>,
    pub failed: BTreeSet<String>,
    count: usize,
}

impl Answers {
    fn add(&mut self, result: Result<Answer>) {
        self.count += 1;
        match result.and_then(|answer| {
            let peer: SocketAddr = answer.peer.parse().with_context(|| format!("no address: {}", answer.peer))?;
            Ok((answer.backend, peer.ip()))
        }) {
            Ok((backend, peer)) => {
                self.answered.entry(backend).or_default().insert(peer);
            }
            Err(error) => {
                self.failed.insert(format!("{error:#}"));
            }
        }
    }

    /// Of n outcomes equally likely the last is missed with a probability of n (1 - 1/n)^16n: less than one in a million.
    /// Failures take their time, so there, half as many of one kind are believed.
    fn complete(&self) -> bool {
        let outcomes = (self.answered.len() + self.failed.len()).max(1);
        self.count >= if self.answered.is_empty() { BATCH * outcomes } else { BATCH * (outcomes + 1) }
    }
}

/// Answers the questions on the standard input.
#[tokio::main(flavor = "current_thread")]
pub async fn run() -> Result<()> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    let questions: Vec<Question> = serde_json::from_str(&text).context("the standard input is no list of questions")?;
    let permits = Arc::new(Semaphore::new(AT_ONCE));
    let local = LocalSet::new();
    let asked: Vec<_> =
        questions.into_iter().map(|question| local.spawn_local(ask(question, Arc::clone(&permits)))).collect();
    let answers = local
        .run_until(async {
            let mut answers = Vec::new();
            for asked in asked {
                answers.push(asked.await.context("a probe broke off")??);
            }
            anyhow::Ok(answers)
        })
        .await?;
    writeln!(std::io::stdout(), "{}", serde_json::to_string(&answers)?)?;
    Ok(())
}

async fn ask(question: Question, permits: Arc<Semaphore>) -> Result<Answers> {
    let target = Target::parse(&question.target)?;
    let ports = question.source_ports;
    let mut answers = Answers::default();
    if ports.start() == ports.end() {
        for _ in 0..OF_A_FLOW {
            answers.add(within_patience(target.ask_once(ports.clone())).await);
        }
        return Ok(answers);
    }
    let mut requests = JoinSet::new();
    let mut batch = FIRST;
    while !answers.complete() {
        for _ in 0..batch {
            let (target, permits, ports) = (target.clone(), Arc::clone(&permits), ports.clone());
            // Who waits for an answer that does not come keeps nobody else waiting.
            let answered = !answers.answered.is_empty();
            requests.spawn_local(async move {
                let _permit = if answered { Some(permits.acquire_owned().await) } else { None };
                within_patience(target.ask_once(ports)).await
            });
        }
        while let Some(result) = requests.join_next().await {
            answers.add(result.context("a request broke off")?);
        }
        batch = BATCH;
    }
    Ok(answers)
}

async fn within_patience(request: impl Future<Output = Result<Answer>>) -> Result<Answer> {
    timeout(PATIENCE, request).await.unwrap_or_else(|_| bail!("timeout"))
}

impl Lab {
    /// Asks all of these from a host, and waits for the answers, which are in the questions' order.
    pub fn probe(&self, host: &str, questions: &[Question]) -> Result<Vec<Answers>> {
        let mut command = Command::new(binaries::lab()?);
        command.arg("probe").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = self.spawn(host, command)?;
        let child = process.child();
        let mut input = child.stdin.take().context("no standard input")?;
        input.write_all(serde_json::to_string(questions)?.as_bytes())?;
        drop(input);
        let mut text = String::new();
        child.stdout.take().context("no standard output")?.read_to_string(&mut text)?;
        let status = process.wait()?;
        if !status.success() {
            bail!("the probes of {host} ended with {status}");
        }
        Ok(serde_json::from_str(&text)?)
    }
}
