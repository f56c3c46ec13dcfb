//! The machine: its file system, its start, and what it says.
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::archive::Archive;
use super::kernel::{Kernel, download};
use crate::setup::in_path;
use crate::step::{output, program, root};

/// Programs that the tests call, besides busybox's.
const TOOLS: [&str; 1] = ["ip"];
/// Tests find the agent and the lab's program one directory above them.
const PROGRAMS: &str = "/svc";
/// The last line that the machine says, before the verdict.
const VERDICT: &str = "svc-vm:";

/// The shell and the small programs of a machine.
pub(super) struct Busybox(PathBuf);

impl Busybox {
    fn place(directory: &Path) -> PathBuf {
        directory.join("busybox")
    }

    pub(super) fn is_kept(directory: &Path) -> bool {
        Self::place(directory).exists()
    }

    /// One that was fetched before is taken as it is.
    pub(super) fn ensure(directory: &Path) -> Result<Self> {
        let kept = Self::place(directory);
        if !kept.exists() {
            let unpacked = download(directory, "busybox-static")?;
            fs::rename(unpacked.join("bin/busybox"), &kept).context("busybox-static has no busybox")?;
        }
        Ok(Busybox(kept))
    }
}

pub(super) struct Guest {
    directory: PathBuf,
    busybox: Busybox,
    /// Here, and there.
    files: Vec<(PathBuf, PathBuf)>,
    script: String,
}

impl Guest {
    pub(super) fn new(directory: &Path, busybox: Busybox) -> Result<Self> {
        let mut guest = Guest { directory: directory.to_owned(), busybox, files: Vec::new(), script: INIT.to_owned() };
        for tool in TOOLS {
            let path = in_path(tool).with_context(|| format!("{tool} is not in PATH"))?;
            guest.files.push((path, Path::new("/bin").join(tool)));
        }
        for name in ["svc-agent", "svc-lab"] {
            let built = program(name)?;
            guest.add_program(built.get_program().as_ref(), &Path::new(PROGRAMS).join(name))?;
        }
        // The lab looks for the manifests where they were when it was built.
        let examples = root().join("examples/hostnames");
        for entry in fs::read_dir(&examples).with_context(|| format!("cannot read {}", examples.display()))? {
            let path = entry?.path().canonicalize()?;
            guest.files.push((path.clone(), path));
        }
        Ok(guest)
    }

    /// One of `tests/`, to be run with these arguments.
    pub(super) fn add_test(&mut self, name: &str, binary: &Path, arguments: &[&str]) -> Result<()> {
        let path = Path::new(PROGRAMS).join("tests").join(name);
        self.add_program(binary, &path)?;
        let arguments = arguments.join(" ");
        self.script.push_str(&format!("run {} {arguments}\n", path.display()));
        Ok(())
    }

    /// Without what only a debugger reads, which is most of it.
    fn add_program(&mut self, built: &Path, path: &Path) -> Result<()> {
        let name = path.file_name().context("a program has a name")?;
        let stripped = self.directory.join("stripped").join(name);
        fs::create_dir_all(self.directory.join("stripped"))?;
        let mut strip = Command::new("strip");
        strip.arg("--strip-all").arg("-o").arg(&stripped).arg(built);
        if !strip.status().context("cannot start strip (binutils)")?.success() {
            bail!("cannot strip {}", built.display());
        }
        self.files.push((stripped, path.to_owned()));
        Ok(())
    }

    /// Runs the tests on this kernel.
    pub(super) fn run(&self, kernel: &Kernel, timeout: Duration) -> Result<()> {
        let archive = self.directory.join(format!("initramfs-{}", kernel.series));
        self.pack(kernel, &archive)?;
        let machine = Machine(
            Command::new("qemu-system-x86_64")
                .args(["-accel", "tcg", "-cpu", PROCESSOR, "-smp", "1", "-m", "2048"])
                .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"])
                .args(["-append", COMMAND_LINE])
                .arg("-kernel")
                .arg(&kernel.image)
                .arg("-initrd")
                .arg(&archive)
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn()
                .context("cannot start qemu-system-x86_64")?,
        );
        follow(&kernel.series, machine, timeout)
    }

    fn pack(&self, kernel: &Kernel, path: &Path) -> Result<()> {
        let mut archive = Archive::create(path)?;
        for directory in ["proc", "sys", "dev", "run", "tmp", "root"] {
            archive.directory(&Path::new("/").join(directory))?;
        }
        // By way of its source's directory.
        archive.directory(&root().canonicalize()?.join("tests/lab"))?;
        archive.copy(&self.busybox.0, "/bin/busybox".as_ref())?;
        archive.link("/bin/sh".as_ref(), "busybox")?;
        let mut libraries = BTreeSet::new();
        for (from, to) in &self.files {
            archive.copy(from, to)?;
            libraries.extend(needed_libraries(from));
        }
        for library in libraries {
            archive.copy(&library, &library)?;
        }
        let mut modules = Vec::new();
        for module in &kernel.modules {
            let name = module.file_name().context("a module has a name")?;
            let to = Path::new("/modules").join(name);
            archive.copy(module, &to)?;
            modules.push(format!("insmod {}\n", to.display()));
        }
        let script = format!("{}end\n", self.script.replace("MODULES\n", &modules.concat()));
        archive.file("/init".as_ref(), script.as_bytes())?;
        archive.finish()
    }
}

/// Without what takes long to emulate: string instructions, which are carried out a byte at a time, and which the kernel does
/// not choose for this old a model; and a fifth level of page tables.
const PROCESSOR: &str = "max,model=4,-erms,-fsrm,-la57";
/// Nobody attacks this machine.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr init_on_alloc=0 hardened_usercopy=off \
    randomize_kstack_offset=off";

/// The first process. Nothing here may fail unseen: the verdict is the last line.
const INIT: &str = r#"#!/bin/busybox sh
PATH=/bin
export HOME=/root SVC_LAB_PATIENCE=600
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
ip link set lo up
failed=
up() {
    cut -d. -f1 /proc/uptime
}
run() {
    echo "$ ${1##*/} $(shift; echo "$@")"
    began=$(up)
    "$@" || failed="$failed ${1##*/}"
    echo "${1##*/}: $(($(up) - began)) s"
}
end() {
    echo "svc-vm: ${failed:-passed} (up $(up) s)"
    poweroff -f
}
MODULES
"#;

/// Paths of the shared libraries, the loader among them.
fn needed_libraries(program: &Path) -> Vec<PathBuf> {
    // It fails where there are none.
    let list = output(Command::new("ldd").arg(program)).unwrap_or_default();
    list.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

/// Killed when dropped.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Shows what the machine says, until its verdict.
fn follow(name: &str, mut machine: Machine, timeout: Duration) -> Result<()> {
    let output = machine.0.stdout.take().context("the machine has no output")?;
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                break;
            }
        }
    });
    let deadline = Instant::now() + timeout;
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                println!("  {name:>5} | {line}");
                if let Some(verdict) = line.strip_prefix(VERDICT) {
                    if verdict.trim_start().starts_with("passed") {
                        return Ok(());
                    }
                    bail!("failed:{verdict}");
                }
            }
            Err(RecvTimeoutError::Timeout) => bail!("not done after {} s", timeout.as_secs()),
            Err(RecvTimeoutError::Disconnected) => bail!("the machine ended without a verdict"),
        }
    }
}
