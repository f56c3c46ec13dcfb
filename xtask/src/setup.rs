//! Installs what the kernel part needs to be built, and the lab to be run. What is there is left as it is.
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::host;
use crate::step::{cargo, done, output, step};

const BPF_LINKER: &str = "0.13.0";
/// The LLVM versions that this bpf-linker can be built for.
const BPF_LINKER_LLVM: std::ops::RangeInclusive<u32> = 21..=23;

/// Install what is missing to build the kernel part.
#[derive(clap::Args)]
pub(crate) struct Options {}

pub(crate) fn run(_: &Options) -> Result<()> {
    ensure()
}

/// Everything that building needs. Prints a line a step; takes no time when all is there.
pub(crate) fn ensure() -> Result<()> {
    host::require_linux()?;
    let compiler = ensure_compiler()?;
    ensure_bpf_linker(&compiler)
}

/// What the lab calls at run time.
pub(crate) fn ensure_lab_tools() -> Result<()> {
    if answers("ip", &["-V"]) {
        return Ok(());
    }
    apt_install("iproute2", &["iproute2".to_owned()])
        .context("`ip` of iproute2 is missing, which makes the lab's network")
}

/// What kube-proxy calls.
pub(crate) fn ensure_kube_proxy_tools() -> Result<()> {
    if answers("nft", &["--version"]) && answers("iptables", &["--version"]) {
        return Ok(());
    }
    apt_install("programs that kube-proxy calls", &["nftables".to_owned(), "iptables".to_owned()])
        .context("`nft` and `iptables` are missing, by which kube-proxy writes its rules")
}

/// What runs containers, and what makes images of a Debian.
pub(crate) fn ensure_cluster_tools() -> Result<()> {
    let plugins = Path::new("/usr/lib/cni/ptp").exists();
    if plugins && answers("/usr/sbin/runc", &["--version"]) && answers("mmdebstrap", &["--version"]) {
        return Ok(());
    }
    let packages = ["runc", "containernetworking-plugins", "mmdebstrap"].map(str::to_owned);
    apt_install("container runtime", &packages)
        .context("`runc`, the CNI plugins or `mmdebstrap` are missing, without which the cluster has no containers")
}

/// What starts other kernels. Those themselves are fetched by apt as well.
pub(crate) fn ensure_vm_tools() -> Result<()> {
    if answers("qemu-system-x86_64", &["--version"]) && answers("xz", &["--version"]) {
        return Ok(());
    }
    apt_install("virtual machine", &["qemu-system-x86".to_owned(), "xz-utils".to_owned()])
        .context("`qemu-system-x86_64` is missing, in which other kernels are started")
}

/// What the control-plane tests are built with.
pub(crate) fn require_go() -> Result<()> {
    if env::var_os("KUBEBUILDER_ASSETS").is_none() && !answers("go", &["version"]) {
        bail!(
            "kube-apiserver, etcd, kube-proxy, kubectl and helm are built with Go, which is not here; install Go 1.26 (https://go.dev/dl)"
        );
    }
    Ok(())
}

/// What is on this machine, as far as the choice of a compiler for the kernel part asks.
struct Found {
    /// Every rustup nightly, and whether it has the sources of core.
    nightlies: Vec<(String, bool)>,
    distribution_sources: bool,
    apt_as_root: bool,
}

#[derive(Debug, PartialEq)]
enum Choice {
    Nightly(String),
    Distribution,
    InstallFromDistribution,
    Nothing,
}

/// A nightly with sources is the usual way; a distribution's compiler with sources does as well.
fn choose(found: &Found) -> Choice {
    if let Some((name, _)) = found.nightlies.iter().find(|(_, sources)| *sources) {
        Choice::Nightly(name.clone())
    } else if found.distribution_sources {
        Choice::Distribution
    } else if found.apt_as_root {
        Choice::InstallFromDistribution
    } else {
        Choice::Nothing
    }
}

fn ensure_compiler() -> Result<Compiler> {
    let found = Found {
        nightlies: rustup_nightlies(),
        distribution_sources: Compiler::distribution().has_sources(),
        apt_as_root: host::is_root() && answers("apt-get", &["--version"]),
    };
    match choose(&found) {
        Choice::Nightly(name) => {
            done("compiler for the kernel part", &name);
            Ok(Compiler::nightly(&name))
        }
        Choice::Distribution => {
            let compiler = Compiler::distribution();
            done("compiler for the kernel part", &format!("{} (the distribution's)", compiler.release()?));
            Ok(compiler)
        }
        Choice::InstallFromDistribution => install_from_distribution(),
        Choice::Nothing => bail!(NO_COMPILER),
    }
}

const NO_COMPILER: &str = "no Rust compiler here can build core for eBPF; install a nightly with its sources \
    (rustup toolchain install nightly --component rust-src), or run this as root on Debian, where the packages rustc-web, \
    cargo-web and rust-web-src are installed instead";

fn install_from_distribution() -> Result<Compiler> {
    let packages = ["rustc-web", "cargo-web", "rust-web-src", "libstd-rust-web-dev"];
    apt_install("compiler for the kernel part", &packages.map(str::to_owned)).context(NO_COMPILER)?;
    let compiler = Compiler::distribution();
    if !compiler.has_sources() {
        bail!("{NO_COMPILER}; the packages brought no sources of core to {}", compiler.sources()?.display());
    }
    Ok(compiler)
}

fn ensure_bpf_linker(compiler: &Compiler) -> Result<()> {
    let llvm = compiler.llvm()?;
    let Some(problem) = bpf_linker_problem(llvm) else {
        done("bpf-linker", &format!("{BPF_LINKER} on LLVM {llvm}"));
        return Ok(());
    };
    install_bpf_linker(llvm).with_context(|| format!("bpf-linker {BPF_LINKER} is needed: {problem}"))?;
    if let Some(problem) = bpf_linker_problem(llvm) {
        bail!("bpf-linker was installed, but {problem}; put cargo's bin directory first in PATH");
    }
    Ok(())
}

fn install_bpf_linker(llvm: u32) -> Result<()> {
    if !BPF_LINKER_LLVM.contains(&llvm) {
        bail!(
            "the compiler is built on LLVM {llvm}, for which there is no bpf-linker {BPF_LINKER}; use one on LLVM {} to {}",
            BPF_LINKER_LLVM.start(),
            BPF_LINKER_LLVM.end()
        );
    }
    let prefix = PathBuf::from(format!("/usr/lib/llvm-{llvm}"));
    if !prefix.join("include/llvm-c/Core.h").exists() || !Path::new("/usr/include/zstd.h").exists() {
        let packages =
            [format!("llvm-{llvm}-dev"), format!("libpolly-{llvm}-dev"), "libzstd-dev".into(), "zlib1g-dev".into()];
        apt_install(&format!("LLVM {llvm} for bpf-linker"), &packages)?;
    }
    step(
        "bpf-linker",
        cargo()
            .args(["install", "bpf-linker", "--version", BPF_LINKER, "--force", "--no-default-features", "--features"])
            .arg(format!("llvm-{llvm}"))
            .env("LLVM_PREFIX", prefix)
            .env_remove("RUSTC"),
    )
}

/// Why the bpf-linker in PATH will not do.
fn bpf_linker_problem(llvm: u32) -> Option<String> {
    let Some(version) = output(Command::new("bpf-linker").arg("--version")) else {
        return Some("there is none in PATH".into());
    };
    let Some(path) = in_path("bpf-linker") else {
        return Some("there is none in PATH".into());
    };
    let libraries = output(Command::new("ldd").arg(path)).unwrap_or_default();
    linker_mismatch(&version, &libraries, llvm)
}

/// It reads the compiler's bitcode, so it must be linked against the compiler's LLVM: after the distribution has moved to the
/// next one, the old linker would fail with an obscure message.
fn linker_mismatch(version: &str, libraries: &str, llvm: u32) -> Option<String> {
    if !version.split_whitespace().any(|word| word == BPF_LINKER) {
        return Some(format!("this is {}", version.trim()));
    }
    let linked = libraries.split_whitespace().find_map(|word| {
        let rest = word.strip_prefix("libLLVM.so.").or_else(|| word.strip_prefix("libLLVM-"))?;
        rest.split(|c: char| !c.is_ascii_digit()).next()?.parse::<u32>().ok()
    });
    match linked {
        Some(other) if other != llvm => Some(format!("this one is built on LLVM {other}, the compiler on LLVM {llvm}")),
        _ => None,
    }
}

struct Compiler {
    program: PathBuf,
    toolchain: Option<String>,
}

impl Compiler {
    fn distribution() -> Self {
        Compiler { program: "/usr/bin/rustc".into(), toolchain: None }
    }

    fn nightly(name: &str) -> Self {
        Compiler { program: "rustc".into(), toolchain: Some(format!("+{name}")) }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        // Set by the cargo that runs this, it would override the toolchain asked for.
        command.env_remove("RUSTUP_TOOLCHAIN").args(&self.toolchain);
        command
    }

    fn sources(&self) -> Result<PathBuf> {
        let sysroot = output(self.command().args(["--print", "sysroot"])).context("rustc does not tell its sysroot")?;
        Ok(Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library"))
    }

    fn has_sources(&self) -> bool {
        self.sources().is_ok_and(|sources| sources.join("core").exists())
    }

    fn verbose_version(&self) -> Result<String> {
        output(self.command().arg("-vV"))
            .with_context(|| format!("{} does not tell its version", self.program.display()))
    }

    fn release(&self) -> Result<String> {
        let version = self.verbose_version()?;
        Ok(version.lines().next().unwrap_or_default().to_owned())
    }

    fn llvm(&self) -> Result<u32> {
        let version = self.verbose_version()?;
        llvm_major(&version).with_context(|| format!("{} does not tell its LLVM version", self.program.display()))
    }
}

fn llvm_major(verbose_version: &str) -> Option<u32> {
    let version = verbose_version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
    version.split('.').next()?.trim().parse().ok()
}

fn rustup_nightlies() -> Vec<(String, bool)> {
    let list = output(Command::new("rustup").args(["toolchain", "list"])).unwrap_or_default();
    nightly_names(&list).map(|name| (name.to_owned(), Compiler::nightly(name).has_sources())).collect()
}

fn nightly_names(list: &str) -> impl Iterator<Item = &str> {
    list.lines().filter_map(|line| line.split_whitespace().next()).filter(|name| name.starts_with("nightly"))
}

/// What packages there are.
pub(crate) fn package_lists() -> Result<()> {
    step("package lists", Command::new("apt-get").args(["update", "-q"]))
}

fn apt_install(title: &str, packages: &[String]) -> Result<()> {
    if !host::is_root() || !answers("apt-get", &["--version"]) {
        bail!("install these, by your system's package manager or as root on Debian: {}", packages.join(" "));
    }
    package_lists()?;
    step(
        title,
        Command::new("apt-get")
            .args(["install", "-y", "-q", "--no-install-recommends"])
            .args(packages)
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )
}

fn answers(program: &str, arguments: &[&str]) -> bool {
    output(Command::new(program).args(arguments)).is_some()
}

pub(crate) fn in_path(program: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|directory| directory.join(program)).find(|path| path.exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(nightlies: &[(&str, bool)], distribution_sources: bool, apt_as_root: bool) -> Found {
        let nightlies = nightlies.iter().map(|(name, sources)| ((*name).to_owned(), *sources)).collect();
        Found { nightlies, distribution_sources, apt_as_root }
    }

    #[test]
    fn a_nightly_with_sources_comes_first() {
        let machine = found(&[("nightly-2026-01-01", false), ("nightly", true)], true, true);
        assert_eq!(choose(&machine), Choice::Nightly("nightly".into()));
    }

    #[test]
    fn a_nightly_without_sources_does_not_count() {
        assert_eq!(choose(&found(&[("nightly", false)], true, true)), Choice::Distribution);
        assert_eq!(choose(&found(&[("nightly", false)], false, true)), Choice::InstallFromDistribution);
        assert_eq!(choose(&found(&[("nightly", false)], false, false)), Choice::Nothing);
    }

    #[test]
    fn nightlies_are_told_from_other_toolchains() {
        let list =
            "stable-x86_64-unknown-linux-gnu (active, default)\nnightly-x86_64-unknown-linux-gnu\n1.95.0-x86_64\n";
        assert_eq!(nightly_names(list).collect::<Vec<_>>(), ["nightly-x86_64-unknown-linux-gnu"]);
    }

    #[test]
    fn llvm_version_of_rustc() {
        assert_eq!(llvm_major("rustc 1.96.0\nrelease: 1.96.0\nLLVM version: 22.1.8\n"), Some(22));
        assert_eq!(llvm_major("rustc 1.96.0\n"), None);
    }

    #[test]
    fn a_linker_of_the_right_version_on_the_right_llvm_stays() {
        let libraries = "\tlibLLVM.so.22.1 => /usr/lib/llvm-22/lib/libLLVM.so.22.1 (0x0)\n";
        assert_eq!(linker_mismatch("bpf-linker 0.13.0\n", libraries, 22), None);
        assert_eq!(linker_mismatch("bpf-linker 0.13.0\n", "\tlibc.so.6 => /lib/libc.so.6\n", 22), None);
    }

    #[test]
    fn an_old_linker_or_one_on_another_llvm_is_replaced() {
        let libraries = "\tlibLLVM.so.22.1 => /usr/lib/llvm-22/lib/libLLVM.so.22.1 (0x0)\n";
        assert!(linker_mismatch("bpf-linker 0.9.13\n", libraries, 22).is_some());
        assert!(linker_mismatch("bpf-linker 0.13.0\n", libraries, 23).is_some());
    }
}
