//! Which filters on interfaces' clsact qdiscs are the agent's: a filter has no pin, so a directory on the bpf file system
//! stands for each, and one for each qdisc that was made for them. The next agent and `svc-agent cleanup` go by those.
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use nix::net::if_::{if_indextoname, if_nametoindex};

use crate::clsact::{Clsact, Side};

/// The directory of the records.
pub const DIRECTORY: &str = "filters";
const QDISC: &str = "qdisc-";

/// The programs on interfaces, each with the number of its filter: an interface may change from a pod's to an uplink.
const PROGRAMS: [(&str, Side, u16); 4] = [
    ("ingress", Side::Ingress, 1),
    ("egress", Side::Egress, 1),
    ("pod_ingress", Side::Ingress, 2),
    ("pod_egress", Side::Egress, 2),
];

pub struct Filters {
    directory: PathBuf,
    clsact: Clsact,
}

/// A record's meaning.
struct Place {
    side: Side,
    number: u16,
    /// None where the interface has gone.
    interface: Option<u32>,
}

impl Filters {
    /// # Errors
    /// Where there is no netlink socket to be had.
    pub fn open(bpffs: &Path) -> anyhow::Result<Self> {
        let clsact = Clsact::open().context("opening a netlink socket for filters")?;
        Ok(Filters { directory: bpffs.join(DIRECTORY), clsact })
    }

    /// Puts the program there, in one step in the place of the one before.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn put(&self, record: &str, program: BorrowedFd<'_>) -> anyhow::Result<()> {
        let (side, number, interface) = parse(record).with_context(|| format!("no such filter: {record}"))?;
        let index = if_nametoindex(interface.as_str()).with_context(|| format!("the interface {interface}"))?;
        // A record without a filter does no harm, a filter without a record stays for good.
        self.record(record)?;
        let new = self.clsact.add_qdisc(index).with_context(|| {
            format!("making the clsact qdisc of {interface} (a qdisc of kind ingress would be in its place)")
        })?;
        if new {
            self.record(&format!("{QDISC}{index}"))?;
        }
        self.clsact
            .put(index, side, number, &format!("svc_{record}"), program)
            .with_context(|| format!("attaching the filter svc_{record}"))
    }

    /// Removes the filter and its record, and the qdisc where it was made for it and nobody else has a filter there.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn remove(&self, record: &str) -> anyhow::Result<()> {
        if !self.directory.join(record).exists() {
            return Ok(());
        }
        if let Some(Place { side, number, interface: Some(index) }) = place(record) {
            self.clsact.remove(index, side, number).with_context(|| format!("removing the filter svc_{record}"))?;
            let qdisc = format!("{QDISC}{index}");
            if self.directory.join(&qdisc).exists()
                && self.clsact.is_unused(index).context("asking for an interface's filters")?
            {
                self.clsact.remove_qdisc(index).context("removing a clsact qdisc")?;
                self.forget(&qdisc)?;
            }
        }
        self.forget(record)?;
        self.forget_gone_qdiscs()
    }

    /// Removes all.
    ///
    /// # Errors
    /// Where the records cannot be read, or a filter not be removed.
    pub fn remove_all(&self, mut tell: impl FnMut(&str) -> anyhow::Result<()>) -> anyhow::Result<()> {
        for record in self.records()? {
            self.remove(&record)?;
            tell(&record)?;
        }
        // Those whose filters somebody else has removed, and those that now have somebody else's.
        for name in self.names()? {
            self.forget(&name)?;
        }
        Ok(())
    }

    /// Of each filter that there should be: a hook and an interface.
    ///
    /// # Errors
    /// Where the directory cannot be read.
    pub fn records(&self) -> anyhow::Result<Vec<String>> {
        let mut names = self.names()?;
        names.retain(|name| !name.starts_with(QDISC));
        Ok(names)
    }

    /// The id of the program that the filter runs; none where it is not there.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn program(&self, record: &str) -> io::Result<Option<u32>> {
        match place(record) {
            Some(Place { side, number, interface: Some(index) }) => self.clsact.program(index, side, number),
            _ => Ok(None),
        }
    }

    fn names(&self) -> anyhow::Result<Vec<String>> {
        let entries = match std::fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries,
        };
        let names = entries
            .and_then(|entries| entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect());
        let mut names: Vec<String> = names.with_context(|| format!("reading {}", self.directory.display()))?;
        names.sort();
        Ok(names)
    }

    fn record(&self, name: &str) -> anyhow::Result<()> {
        let path = self.directory.join(name);
        std::fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))
    }

    fn forget(&self, name: &str) -> anyhow::Result<()> {
        let path = self.directory.join(name);
        match std::fs::remove_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("removing {}", path.display()))
            }
            _ => Ok(()),
        }
    }

    fn forget_gone_qdiscs(&self) -> anyhow::Result<()> {
        for name in self.names()? {
            let index = name.strip_prefix(QDISC).and_then(|index| index.parse().ok());
            if index.is_some_and(|index: u32| if_indextoname(index).is_err()) {
                self.forget(&name)?;
            }
        }
        Ok(())
    }
}

fn place(record: &str) -> Option<Place> {
    let (side, number, interface) = parse(record)?;
    Some(Place { side, number, interface: if_nametoindex(interface.as_str()).ok() })
}

/// The name is a pin's: see `attach::pin_name`.
fn parse(record: &str) -> Option<(Side, u16, String)> {
    PROGRAMS.iter().find_map(|(program, side, number)| {
        let interface = record.strip_prefix(program)?.strip_prefix('-')?;
        Some((*side, *number, interface.replace(':', ".")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("ingress-eth0", Some((Side::Ingress, 1, "eth0")))]
    #[case("egress-bond0:12", Some((Side::Egress, 1, "bond0.12")))]
    #[case("pod_ingress-veth-a", Some((Side::Ingress, 2, "veth-a")))]
    #[case("qdisc-7", None)]
    #[case("ingress", None)]
    fn a_record_names_a_program_and_an_interface(#[case] record: &str, #[case] meant: Option<(Side, u16, &str)>) {
        let parsed = parse(record);
        assert_eq!(parsed.as_ref().map(|(side, number, name)| (*side, *number, name.as_str())), meant);
    }
}
