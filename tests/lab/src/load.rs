//! Requests of a host of the lab, and what became of them.
use std::collections::BTreeMap;
use std::fmt;
use std::io::{BufRead, BufReader};
use std::mem;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, bail};

use crate::binaries;
use crate::client::{Options, Outcome};
use crate::process::Process;
use crate::topology::Lab;

/// How often each backend answered, and why requests failed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tally {
    pub backends: BTreeMap<String, u32>,
    pub failures: BTreeMap<String, u32>,
}

impl Tally {
    fn of(outcomes: &[Outcome]) -> Self {
        let mut tally = Tally::default();
        for outcome in outcomes {
            match (&outcome.backend, &outcome.error) {
                (Some(backend), _) => *tally.backends.entry(backend.clone()).or_default() += 1,
                (None, error) => {
                    *tally.failures.entry(error.clone().unwrap_or_else(|| "no answer".into())).or_default() += 1;
                }
            }
        }
        tally
    }

    pub fn answered(&self) -> u32 {
        self.backends.values().sum()
    }

    pub fn failed(&self) -> u32 {
        self.failures.values().sum()
    }

    pub fn names(&self) -> Vec<&str> {
        self.backends.keys().map(String::as_str).collect()
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = |counts: &BTreeMap<String, u32>| {
            counts.iter().map(|(name, count)| format!("{name}: {count}")).collect::<Vec<_>>().join(", ")
        };
        write!(formatter, "{} answered ({})", self.answered(), words(&self.backends))?;
        write!(formatter, ", {} failed ({})", self.failed(), words(&self.failures))
    }
}

/// A client that runs.
pub struct Load {
    process: Process,
    reader: Option<JoinHandle<()>>,
    outcomes: Arc<Mutex<Vec<Outcome>>>,
}

impl Load {
    pub fn start(lab: &Lab, host: &str, options: &Options) -> Result<Self> {
        let mut command = Command::new(binaries::lab()?);
        command.arg("client").args(options.arguments()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = lab.spawn(host, command)?;
        let output = process.child().stdout.take().context("the client has no standard output")?;
        let outcomes = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&outcomes);
        let reader = thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if let Ok(outcome) = serde_json::from_str(&line) {
                    sink.lock().unwrap_or_else(PoisonError::into_inner).push(outcome);
                }
            }
        });
        Ok(Load { process, reader: Some(reader), outcomes })
    }

    /// What became of the requests since this was last asked.
    pub fn take(&self) -> Vec<Outcome> {
        mem::take(&mut *self.outcomes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// [`Load::take`], counted.
    pub fn tally(&self) -> Tally {
        Tally::of(&self.take())
    }

    /// Lets the requests under way end, and gives what has not been taken yet.
    pub fn finish(mut self) -> Result<Vec<Outcome>> {
        drop(self.process.child().stdin.take());
        let status = self.process.wait()?;
        if let Some(reader) = self.reader.take() {
            reader.join().map_err(|_| anyhow::anyhow!("the client's output could not be read"))?;
        }
        if !status.success() {
            bail!("a client of the lab ended with {status}");
        }
        Ok(self.take())
    }
}

impl Lab {
    /// Sends requests from a host, and waits for all of them.
    pub fn request(&self, host: &str, options: &Options) -> Result<Vec<Outcome>> {
        // A client without a number goes on until its input closes, which is at once.
        let options = Options { requests: options.requests.or(Some(1)), ..options.clone() };
        Load::start(self, host, &options)?.finish()
    }

    /// [`Lab::request`], counted.
    pub fn tally(&self, host: &str, options: &Options) -> Result<Tally> {
        Ok(Tally::of(&self.request(host, options)?))
    }
}
