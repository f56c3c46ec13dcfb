//! Mounts, pins and ports.
use std::io;
use std::net::SocketAddr;
use std::path::Path;

use nix::unistd::{AccessFlags, access};
use socket2::{Domain, Protocol, Socket, Type};

use super::Finding;
use crate::dataplane::aya;
use crate::{host, inspect};

/// `wanted`: that of `--cgroup`.
pub fn cgroup(wanted: Option<&Path>) -> Finding {
    const CHECK: &str = "cgroup";
    let directory = match (host::cgroup_directory(wanted), wanted) {
        (Ok(directory), _) => directory,
        (Err(_), None) => {
            return Finding::failed(
                CHECK,
                "cgroup v2 is not mounted",
                "mount -t cgroup2 none /sys/fs/cgroup, or say where it is with --cgroup",
            );
        }
        (Err(_), Some(wanted)) => {
            let found = format!("--cgroup {} is no directory of cgroup v2", wanted.display());
            return Finding::failed(CHECK, found, "`findmnt -t cgroup2` says where it is mounted");
        }
    };
    let shown = directory.display();
    // Only the root of the whole hierarchy has no type.
    if !directory.join("cgroup.type").exists() {
        return Finding::ok(CHECK, format!("{shown}, the root: all processes' sockets"));
    }
    if wanted.is_some() {
        return Finding::ok(CHECK, format!("{shown}: sockets of processes below it"));
    }
    Finding::warning(
        CHECK,
        format!("{shown} is not the root of the hierarchy: sockets of processes elsewhere are not pointed at backends"),
        "mount the host's hierarchy into the container, and name it with --cgroup",
    )
}

/// `directory`: that of `--bpffs`, which need not exist.
pub fn bpffs(directory: &Path) -> Finding {
    const CHECK: &str = "bpffs";
    let shown = directory.display();
    let Some(existing) = directory.ancestors().find(|ancestor| ancestor.exists()) else {
        return Finding::failed(CHECK, format!("--bpffs {shown} is no path"), "name a directory on a BPF file system");
    };
    match host::is_bpffs(existing) {
        Ok(true) => {}
        Ok(false) => {
            return Finding::failed(
                CHECK,
                format!("--bpffs {shown} is not on a BPF file system"),
                "mount -t bpf bpf /sys/fs/bpf, or name a directory on one",
            );
        }
        Err(error) => return Finding::failed(CHECK, format!("--bpffs {shown}: {error}"), "name another directory"),
    }
    if access(existing, AccessFlags::W_OK | AccessFlags::X_OK).is_err() {
        return Finding::failed(CHECK, format!("{} may not be written", existing.display()), "mount it for writing");
    }
    Finding::ok(CHECK, format!("{shown}"))
}

/// Whether the maps that are pinned under `directory` are such as this version has.
pub fn pins(directory: &Path) -> Finding {
    const CHECK: &str = "pins";
    if inspect::Pins::open(directory).is_err() {
        return Finding::ok(CHECK, "none: this would be the first start");
    }
    match aya::check_pins(&directory.join("maps")) {
        Ok(()) => Finding::ok(CHECK, "of this version of svc-agent"),
        Err(error) => Finding::failed(
            CHECK,
            format!("{error:#}"),
            "svc-agent cleanup, then start the agent: connections that it translates are cut",
        ),
    }
}

/// Whether `address` can be listened on, or is by a running agent. `proc`: where procfs is mounted.
pub fn port(check: &'static str, flag: &str, address: SocketAddr, proc: &Path) -> Finding {
    let bind = || -> io::Result<()> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        // Nobody listens, so nobody connects.
        socket.bind(&address.into())
    };
    let Err(error) = bind() else { return Finding::ok(check, format!("{address} is free")) };
    if error.kind() != io::ErrorKind::AddrInUse {
        return Finding::failed(
            check,
            format!("{address}: {error}"),
            format!("name an address of this host by {flag}"),
        );
    }
    match listener(proc, address.port()) {
        Some((name, _)) if name == "svc-agent" => Finding::ok(check, format!("{address} is the running agent's")),
        Some((name, pid)) => Finding::failed(
            check,
            format!("{address} is taken by {name} (process {pid})"),
            format!("stop {name}, or choose another port by {flag}"),
        ),
        None => Finding::failed(
            check,
            format!("{address} is taken by a process that is not seen from here"),
            format!("`ss -ltnp` on the host says by whom; or choose another port by {flag}"),
        ),
    }
}

/// The process that listens on a TCP port: its name and number.
fn listener(proc: &Path, port: u16) -> Option<(String, u32)> {
    let inodes: Vec<String> = ["net/tcp", "net/tcp6"]
        .iter()
        .filter_map(|table| std::fs::read_to_string(proc.join(table)).ok())
        .flat_map(|table| listening(&table, port))
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    let processes = std::fs::read_dir(proc).ok()?.flatten();
    processes.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path()))).find_map(
        |(pid, path): (u32, _)| {
            let has_it = std::fs::read_dir(path.join("fd")).ok()?.flatten().any(|descriptor| {
                std::fs::read_link(descriptor.path())
                    .is_ok_and(|target| inodes.iter().any(|inode| target.as_os_str() == inode.as_str()))
            });
            let name = std::fs::read_to_string(path.join("comm")).ok()?;
            has_it.then(|| (name.trim().to_owned(), pid))
        },
    )
}

/// Inodes of the sockets in a table of proc(5) that listen on this port.
fn listening(table: &str, port: u16) -> Vec<String> {
    const LISTEN: &str = "0A";
    let line = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (_, number) = fields.get(1)?.rsplit_once(':')?;
        let is_it = u16::from_str_radix(number, 16) == Ok(port) && fields.get(3) == Some(&LISTEN);
        is_it.then(|| fields.get(9).map(|inode| (*inode).to_owned()))?
    };
    table.lines().skip(1).filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Grade;

    #[test]
    fn a_table_of_sockets_tells_who_listens() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
                     0: 00000000:2810 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0\n   \
                     1: 0100007F:2810 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 0\n   \
                     2: 00000000:2811 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4713 1 0\n";
        assert_eq!(listening(table, 0x2810), ["4711"]);
    }

    #[test]
    fn a_taken_port_names_its_owner() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let finding = port("healthz", "--healthz-bind-address", address, Path::new("/proc"));
        assert_eq!(finding.result, Grade::Failed);
        let own = format!("(process {})", std::process::id());
        assert!(finding.found.ends_with(&own), "{finding:?}");
        drop(taken);
        assert_eq!(port("healthz", "", address, Path::new("/proc")).result, Grade::Ok);
    }

    #[test]
    fn an_ordinary_directory_is_no_place_for_pins_and_stays_as_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let finding = bpffs(&directory.path().join("svc"));
        assert_eq!(finding.result, Grade::Failed);
        assert!(finding.remedy.unwrap().starts_with("mount -t bpf"));
        assert!(!directory.path().join("svc").exists());
    }
}
