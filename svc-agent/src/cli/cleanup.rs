//! `svc-agent cleanup`: takes everything out of the kernel again.
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use nix::errno::Errno;
use svc_common::Addr;
use svc_common::map::{ADDRESS_LOCAL, ADDRESS_NODE, AddressFlags, CidrFlags, CidrKey, Frontend, FrontendKey, pin};
use tokio::signal::unix::{SignalKind, signal};

use super::print;
use crate::filters::{self, Filters};
use crate::host::is_bpffs;
use crate::inspect::{DIRECTORIES, MAPS};
use crate::sys::{self, Plain};

#[derive(clap::Args, Debug)]
pub struct Args {
    /// Where maps, programs and links are pinned.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/svc")]
    bpffs: PathBuf,

    /// Take only the Services away: no connection is served any more but those under way.
    #[arg(long)]
    keep_flows: bool,

    /// Stay until SIGTERM when all is done: for a container that must not end.
    #[arg(long)]
    stay: bool,
}

/// # Errors
/// Where the directory is not of a BPF file system, or a pin cannot be removed.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let directory = &args.bpffs;
    match is_bpffs(directory) {
        Err(Errno::ENOENT) => {}
        Ok(yes) => {
            ensure!(yes, "{} is not in a BPF file system: nothing was removed", directory.display());
        }
        Err(error) => Err(error).with_context(|| format!("cannot read {}", directory.display()))?,
    }
    if args.keep_flows {
        let count = take_services(&directory.join(MAPS))?;
        print::text(&format!("{count} addresses are served no more; what is under way goes on\n"))?;
    } else {
        let removed = remove(directory, |path| print::text(&format!("removed {}\n", path.display())))?;
        if removed == 0 {
            print::text(&format!("nothing to remove under {}\n", directory.display()))?;
        }
    }
    if args.stay { wait_for_end() } else { Ok(()) }
}

/// Takes away what leads to a Service. While ranges and addresses are there, one without its frontend would be refused. The
/// node's own addresses stay, by which flows' replies are known.
fn take_services(maps: &Path) -> anyhow::Result<usize> {
    delete_all::<CidrKey, CidrFlags>(maps, pin::CIDRS, |_| true)?;
    delete_all::<Addr, AddressFlags>(maps, pin::ADDRESSES, |flags| flags & (ADDRESS_NODE | ADDRESS_LOCAL) == 0)?;
    delete_all::<FrontendKey, Frontend>(maps, pin::FRONTENDS, |_| true)
}

fn delete_all<K: Plain, V: Plain>(maps: &Path, name: &str, goes: impl Fn(&V) -> bool) -> anyhow::Result<usize> {
    let emptied = || -> io::Result<usize> {
        let map = match sys::open_pin(&maps.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            map => map?,
        };
        let mut entries = sys::entries::<K, V>(map.as_fd())?;
        entries.retain(|(_, value)| goes(value));
        entries.iter().try_for_each(|(key, _)| sys::delete(map.as_fd(), key))?;
        Ok(entries.len())
    };
    emptied().with_context(|| format!("cannot empty the map {name}"))
}

fn wait_for_end() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start")?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
        terminate.recv().await;
        Ok(())
    })
}

/// Removes the pins and their directories, and nothing that is not the agent's. Returns how much there was.
fn remove(directory: &Path, mut tell: impl FnMut(&Path) -> anyhow::Result<()>) -> anyhow::Result<usize> {
    let mut removed = 0;
    let mut done = |path: &Path, result: io::Result<()>| match result {
        Ok(()) => {
            removed += 1;
            tell(path)
        }
        // Another cleanup was faster.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // Someone else's pins, or the mount point itself.
        Err(error) if path == directory && is_in_use(&error) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot remove {}", path.display())),
    };
    for kind in DIRECTORIES {
        let kind = directory.join(kind);
        if kind.ends_with(filters::DIRECTORY) {
            Filters::open(directory)?.remove_all(|record| done(&kind.join(record), Ok(())))?;
            done(&kind, std::fs::remove_dir(&kind))?;
            continue;
        }
        let mut pins = match std::fs::read_dir(&kind) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries
                .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>())
                .with_context(|| format!("cannot read {}", kind.display()))?,
        };
        pins.sort();
        for pin in pins {
            // What is no link, or is attached to nothing any more, only has to go.
            if let Ok(link) = sys::open_pin(&pin) {
                let _ = sys::link_detach(link.as_fd());
            }
            done(&pin, std::fs::remove_file(&pin))?;
        }
        done(&kind, std::fs::remove_dir(&kind))?;
    }
    done(directory, std::fs::remove_dir(directory))?;
    Ok(removed)
}

fn is_in_use(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::ResourceBusy)
        || error.raw_os_error() == Some(libc::EPERM)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn removed(directory: &Path) -> Vec<String> {
        let mut told = Vec::new();
        let count = remove(directory, |path| {
            told.push(path.strip_prefix(directory).unwrap().display().to_string());
            Ok(())
        });
        assert_eq!(count.unwrap(), told.len());
        told
    }

    fn with_pins(parent: &Path) -> PathBuf {
        let directory = parent.join("svc");
        for pin in ["maps/flows", "links/connect4", "links/egress-eth0"] {
            std::fs::create_dir_all(directory.join(pin).parent().unwrap()).unwrap();
            std::fs::write(directory.join(pin), "").unwrap();
        }
        directory
    }

    #[test]
    fn links_go_before_maps_and_a_second_time_there_is_nothing() {
        let parent = tempfile::tempdir().unwrap();
        let directory = with_pins(parent.path());
        let expected = ["links/connect4", "links/egress-eth0", "links", "maps/flows", "maps", ""];
        assert_eq!(removed(&directory), expected);
        assert!(!directory.exists());
        assert_eq!(removed(&directory), Vec::<String>::new());
    }

    #[test]
    fn what_is_not_the_agent_s_stays() {
        let parent = tempfile::tempdir().unwrap();
        let directory = with_pins(parent.path());
        std::fs::write(directory.join("other"), "").unwrap();
        assert_eq!(removed(&directory).last().unwrap(), "maps");
        assert!(directory.join("other").exists());
    }

    #[test]
    fn an_ordinary_directory_is_left_alone() {
        let parent = tempfile::tempdir().unwrap();
        let directory = with_pins(parent.path());
        let error = run(&Args { bpffs: directory.clone(), keep_flows: false, stay: false }).unwrap_err().to_string();
        assert!(error.contains("not in a BPF file system"), "{error}");
        assert!(directory.join("maps/flows").exists());
    }
}
