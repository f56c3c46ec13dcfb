//! `svc-agent bugreport`: an archive for whoever is to look into a problem. It has no secrets: no tokens, no files that name
//! them, no environment and no packets; addresses and names of Services are what it is about.
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde::Serialize;
use tar::{Builder, Header};

use super::print::{self, Row};
use super::{affinity, backends, check, maps, run, services, status};
use crate::dataplane::dump::dump;
use crate::host;
use crate::inspect::Pins;

/// More flows than these would be no report any more.
const FLOWS: usize = 10_000;

/// Kernel settings that decide what becomes of packets, under /proc/sys/net.
const SETTINGS: [&str; 8] = [
    "core/bpf_jit_enable",
    "ipv4/ip_forward",
    "ipv4/ip_local_port_range",
    "ipv4/ip_local_reserved_ports",
    "ipv4/conf/*/forwarding",
    "ipv4/conf/*/rp_filter",
    "ipv6/conf/*/forwarding",
    "ipv6/conf/*/disable_ipv6",
];

/// What tells of interfaces and routes.
const FILES: [(&str, &str); 5] = [
    ("interfaces.txt", "/proc/net/dev"),
    ("routes-ipv4.txt", "/proc/net/route"),
    ("routes-ipv6.txt", "/proc/net/ipv6_route"),
    ("addresses-ipv6.txt", "/proc/net/if_inet6"),
    ("kernel.txt", "/proc/version"),
];

/// Where an agent's log is found.
const LOGS: &str = "The agent writes its log to standard error, so that it is where its manager keeps that:
  kubectl logs -n kube-system -l app.kubernetes.io/name=svc-agent --prefix --tail=-1
  journalctl -u svc-agent
Look through it before you attach it: it names Services, addresses and API servers, and no credentials.
";

#[derive(clap::Args, Debug)]
#[group(skip)]
pub struct Args {
    /// The archive to be written [default: svc-bugreport-HOST-SECONDS.tar.gz]; one that exists is not overwritten.
    #[arg(short = 'O', long, value_name = "FILE.tar.gz")]
    file: Option<PathBuf>,

    /// Where the running agent serves /healthz and /metrics, and what is checked.
    #[command(flatten, next_help_heading = "As for svc-agent run")]
    run: run::Args,
}

/// # Errors
/// Where the archive cannot be written. What cannot be read stands in the report as the error that it was.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let path = args.file.clone().unwrap_or_else(default_name);
    let file = File::options().write(true).create_new(true).open(&path);
    let file = file.with_context(|| format!("--file {}", path.display()))?;
    let mut archive = Archive::new(file);
    collect(args, &mut archive).with_context(|| format!("writing {}", path.display()))?;
    let names = archive.finish().with_context(|| format!("writing {}", path.display()))?;
    let list: String = names.iter().map(|(name, size)| format!("  {name}  {size} bytes\n")).collect();
    print::text(&print::escape(&format!("{} holds\n{list}", path.display())))
}

fn default_name() -> PathBuf {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let host = run::host_name().unwrap_or_else(|| "host".to_owned()).replace('/', "-");
    format!("svc-bugreport-{host}-{seconds}.tar.gz").into()
}

fn collect(args: &Args, archive: &mut Archive) -> anyhow::Result<()> {
    archive.json("version.json", Ok(serde_json::json!({ "svcAgent": env!("CARGO_PKG_VERSION") })))?;
    archive.json("check.json", Ok(check::findings(&args.run)))?;
    let bpffs = &args.run.bpffs;
    let status = status::Args::of(bpffs, args.run.healthz_bind_address, args.run.metrics_bind_address);
    archive.json("status.json", status::report(&status, true))?;
    match Pins::open(bpffs).and_then(|pins| Ok((pins.state()?, pins))) {
        Ok((state, pins)) => {
            archive.add("state.txt", dump(&state).as_bytes())?;
            archive.rows("services", &services::rows(&state))?;
            archive.rows("backends", &backends::rows(&state))?;
            let sizes = pins.sizes(&state).and_then(|sizes| Ok(maps::rows(sizes, pins.flow_table()?)));
            archive.json("maps.json", sizes)?;
            let clients = pins.affinity().map(|entries| affinity::rows(&state, &entries, host::monotonic_seconds()));
            archive.json("affinity.json", clients.map(|rows| bounded(rows, FLOWS)))?;
            archive.json("flows.json", pins.flows().map(|rows| bounded(rows, FLOWS)))?;
        }
        Err(error) => archive.add("pins-error.txt", format!("{error:#}\n").as_bytes())?,
    }
    archive.add("sysctl.txt", settings(Path::new("/proc/sys/net")).as_bytes())?;
    for (name, path) in FILES {
        let text = std::fs::read(path).unwrap_or_else(|error| format!("{path}: {error}\n").into_bytes());
        archive.add(name, &text)?;
    }
    archive.add("mounts.txt", mounts(&std::fs::read_to_string("/proc/self/mounts").unwrap_or_default()).as_bytes())?;
    archive.add("log.txt", LOGS.as_bytes())
}

/// The first of them, and how many there are.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Bounded<T> {
    total: usize,
    first: Vec<T>,
}

fn bounded<T>(mut rows: Vec<T>, most: usize) -> Bounded<T> {
    let total = rows.len();
    rows.truncate(most);
    Bounded { total, first: rows }
}

fn settings(root: &Path) -> String {
    let mut text = String::new();
    for pattern in SETTINGS {
        let wanted = root.join(pattern);
        let Ok(paths) = glob::glob(&wanted.to_string_lossy()) else { continue };
        for path in paths.flatten() {
            let name = path.strip_prefix(root).unwrap_or(&path).display().to_string();
            let value = std::fs::read_to_string(&path).unwrap_or_else(|error| error.to_string());
            text.push_str(&format!("net/{name} = {}\n", value.trim()));
        }
    }
    text
}

/// Those that the agent needs: what else is mounted, and how, is nobody's business.
fn mounts(table: &str) -> String {
    let is_needed = |line: &&str| line.split(' ').nth(2).is_some_and(|kind| ["bpf", "cgroup2"].contains(&kind));
    table.lines().filter(is_needed).map(|line| format!("{line}\n")).collect()
}

struct Archive {
    tar: Builder<GzEncoder<File>>,
    names: Vec<(String, usize)>,
}

impl Archive {
    fn new(file: File) -> Self {
        Archive { tar: Builder::new(GzEncoder::new(file, Compression::default())), names: Vec::new() }
    }

    fn add(&mut self, name: &str, bytes: &[u8]) -> anyhow::Result<()> {
        let mut header = Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs());
        self.tar.append_data(&mut header, format!("svc-bugreport/{name}"), bytes)?;
        self.names.push((name.to_owned(), bytes.len()));
        Ok(())
    }

    /// An error stands in the value's place.
    fn json<T: Serialize>(&mut self, name: &str, value: anyhow::Result<T>) -> anyhow::Result<()> {
        let text = match value {
            Ok(value) => serde_json::to_string_pretty(&value)?,
            Err(error) => serde_json::to_string_pretty(&serde_json::json!({ "error": format!("{error:#}") }))?,
        };
        self.add(name, text.as_bytes())
    }

    /// For eyes and for scripts.
    fn rows<R: Row>(&mut self, name: &str, rows: &[R]) -> anyhow::Result<()> {
        self.add(&format!("{name}.txt"), print::table(rows).as_bytes())?;
        self.json(&format!("{name}.json"), Ok(rows))
    }

    fn finish(self) -> anyhow::Result<Vec<(String, usize)>> {
        let mut file = self.tar.into_inner()?.finish()?;
        file.flush()?;
        Ok(self.names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_told_by_name_and_absent_ones_are_left_out() {
        let root = tempfile::tempdir().unwrap();
        for (name, value) in [("ipv4/ip_forward", "1\n"), ("ipv4/conf/eth0/rp_filter", "2\n"), ("ipv4/tcp_fin", "9\n")]
        {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, value).unwrap();
        }
        assert_eq!(settings(root.path()), "net/ipv4/ip_forward = 1\nnet/ipv4/conf/eth0/rp_filter = 2\n");
    }

    #[test]
    fn of_mounts_those_that_the_agent_needs_are_told() {
        let table = "bpf /sys/fs/bpf bpf rw 0 0\n//host/share /mnt cifs username=a 0 0\nnone /c cgroup2 rw 0 0\n";
        assert_eq!(mounts(table), "bpf /sys/fs/bpf bpf rw 0 0\nnone /c cgroup2 rw 0 0\n");
    }

    #[test]
    fn a_long_list_is_cut_and_says_how_long_it_was() {
        let cut = bounded((0..5).collect(), 2);
        assert_eq!((cut.total, cut.first), (5, vec![0, 1]));
    }
}
