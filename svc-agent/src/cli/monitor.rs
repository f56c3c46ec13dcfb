//! `svc-agent monitor`: drops, rejects and new flows as they happen.
use std::collections::HashMap;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::ValueEnum;
use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use ipnet::IpNet;
use k8s_openapi::jiff::Timestamp;
use serde::Serialize;
use svc_common::map::Event;
use svc_common::{Kind, Reason};
use tokio::signal::unix::{SignalKind, signal};

use super::namespaces::Namespaces;
use super::print::one_line;
use super::selector::Selector;
use crate::go_duration;
use crate::inspect::Pins;
use crate::monitor::filter::{self, KindFlag};
use crate::monitor::line::{Line, Lost, Names, boot};
use crate::monitor::{RENEW_EVERY, Subscription};

/// Events taken between two looks at the clock and at signals.
const AT_ONCE: usize = 1024;
/// Names are read anew after this time, where there is something to name.
const NAMES_FOR: Duration = Duration::from_secs(5);
/// As long at least, where something has no name yet.
const UNNAMED_FOR: Duration = Duration::from_secs(1);

#[derive(clap::Args, Debug)]
pub struct Args {
    /// Of this Service only: NAME or NAMESPACE/NAME.
    #[arg(long, value_name = "SERVICE")]
    service: Option<Selector>,

    #[command(flatten)]
    namespaces: Namespaces,

    /// Of these kinds only [default: all].
    #[arg(short = 't', long = "type", value_name = "TYPE", value_enum, value_delimiter = ',')]
    kinds: Vec<KindFlag>,

    /// For these reasons only (docs/dataplane.md) [default: all].
    #[arg(short, long = "reason", value_name = "REASON", value_delimiter = ',', value_parser = reason())]
    reasons: Vec<Reason>,

    /// With one of these addresses or CIDRs only, as client, frontend or backend.
    #[arg(long = "address", value_name = "ADDRESS", value_delimiter = ',', value_parser = filter::range)]
    addresses: Vec<IpNet>,

    /// End after as many lines.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,

    /// End after this time [default: at Ctrl-C].
    #[arg(long = "for", value_name = "DURATION", value_parser = go_duration::parse)]
    time: Option<Duration>,

    /// Where maps, programs and links are pinned.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/svc")]
    bpffs: PathBuf,

    /// How it is printed: lines, or JSON, an object a line.
    #[arg(short, long, value_enum, default_value_t = Format::Text)]
    output: Format,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
enum Format {
    Text,
    Json,
}

fn reason() -> impl clap::builder::TypedValueParser<Value = Reason> {
    PossibleValuesParser::new(filter::reasons().map(Reason::label)).map(|label| {
        filter::reasons().find(|reason| reason.label() == label).expect("one of the values that are possible")
    })
}

/// # Errors
/// Where the pins cannot be read, or nobody else may listen.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let kinds: Vec<Kind> = args.kinds.iter().copied().map(Kind::from).collect();
    let reasons = filter::bits(&kinds, &args.reasons);
    ensure!(reasons != 0, "no reason of --reason is of a kind of --type");
    let pins = Pins::open(&args.bpffs)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start")?;
    match runtime.block_on(watch(args, &pins, reasons)) {
        // A reader that has seen enough (`| head`) is no failure.
        Err(error) if is_broken_pipe(&error) => Ok(()),
        result => result,
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

async fn watch(args: &Args, pins: &Pins, reasons: u32) -> anyhow::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut printer = Printer::new(args, pins)?;
    let mut subscription = Subscription::open(&pins.maps(), reasons)?;
    eprintln!("Drops, rejects and new flows as they happen; Ctrl-C ends it.");
    let mut renewals = tokio::time::interval(RENEW_EVERY);
    let time = args.time;
    let end = async move {
        match time {
            Some(time) => tokio::time::sleep(time).await,
            None => std::future::pending().await,
        }
    };
    let mut end = std::pin::pin!(end);
    let mut events = Vec::with_capacity(AT_ONCE);
    loop {
        tokio::select! {
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
            () = &mut end => break,
            _ = renewals.tick() => {
                if !subscription.renew()? {
                    eprintln!("Held up for so long that events are missing here.");
                }
                printer.lost(subscription.lost()?)?;
                if reader_is_gone() {
                    break;
                }
            }
            taken = subscription.take(AT_ONCE, &mut events) => {
                taken?;
                if printer.print(events.drain(..))? {
                    break;
                }
            }
        }
    }
    printer.lost(subscription.lost()?)
}

/// Whether nobody reads what is printed any more, as where a `kubectl exec` was ended: on a quiet node nothing would be printed, and
/// so nothing would tell.
fn reader_is_gone() -> bool {
    let mut stdout = libc::pollfd { fd: libc::STDOUT_FILENO, events: 0, revents: 0 };
    // SAFETY: one descriptor, as is said.
    let ready = unsafe { libc::poll(&raw mut stdout, 1, 0) };
    ready > 0 && stdout.revents & libc::POLLERR != 0
}

struct Printer<'a> {
    args: &'a Args,
    pins: &'a Pins,
    boot: Timestamp,
    names: Names,
    read: Instant,
    interfaces: HashMap<u32, Option<String>>,
    printed: u64,
}

impl<'a> Printer<'a> {
    fn new(args: &'a Args, pins: &'a Pins) -> anyhow::Result<Self> {
        let boot = boot();
        let names = Names::new(pins.names()?, boot);
        Ok(Printer { args, pins, boot, names, read: Instant::now(), interfaces: HashMap::new(), printed: 0 })
    }

    /// True where that was all that was asked for.
    fn print(&mut self, events: impl Iterator<Item = Event>) -> anyhow::Result<bool> {
        if self.read.elapsed() > NAMES_FOR {
            self.read_names()?;
        }
        let mut text = String::new();
        let mut enough = false;
        for event in events {
            let Some(line) = self.line(&event)? else { continue };
            if !self.is_wanted(&event, &line) {
                continue;
            }
            self.write(&mut text, &line, Line::text)?;
            self.printed += 1;
            if self.args.count.is_some_and(|count| self.printed >= count) {
                enough = true;
                break;
            }
        }
        put(&text)?;
        Ok(enough)
    }

    fn line(&mut self, event: &Event) -> anyhow::Result<Option<Line>> {
        let line = self.named(event);
        if line.as_ref().is_some_and(|line| line.service.is_none()) && self.read.elapsed() > UNNAMED_FOR {
            self.read_names()?;
            return Ok(self.named(event));
        }
        Ok(line)
    }

    fn named(&mut self, event: &Event) -> Option<Line> {
        let name = |index| nix::net::if_::if_indextoname(index).ok()?.into_string().ok();
        let interfaces = &mut self.interfaces;
        Line::new(event, &self.names, |index| interfaces.entry(index).or_insert_with(|| name(index)).clone())
    }

    fn read_names(&mut self) -> anyhow::Result<()> {
        self.names = Names::new(self.pins.names()?, self.boot);
        // A number may be another interface's by now.
        self.interfaces.clear();
        self.read = Instant::now();
        Ok(())
    }

    fn is_wanted(&self, event: &Event, line: &Line) -> bool {
        let of_service = |selector: &Selector| {
            let name = line.service.as_ref().and_then(|service| service.split_once('/'));
            name.is_some_and(|(namespace, name)| selector.matches(namespace, name))
        };
        self.args.service.as_ref().is_none_or(of_service)
            && self.args.namespaces.has_service(line.service.as_deref())
            && filter::is_in(event, &self.args.addresses)
    }

    fn lost(&self, events: u64) -> anyhow::Result<()> {
        if events == 0 {
            return Ok(());
        }
        let mut text = String::new();
        self.write(&mut text, &Lost::now(events), Lost::text)?;
        put(&text)
    }

    fn write<T: Serialize>(&self, text: &mut String, item: &T, words: impl Fn(&T) -> String) -> anyhow::Result<()> {
        let line = match self.args.output {
            Format::Text => words(item),
            Format::Json => serde_json::to_string(item)?,
        };
        text.push_str(&one_line(&line));
        text.push('\n');
        Ok(())
    }
}

fn put(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}
