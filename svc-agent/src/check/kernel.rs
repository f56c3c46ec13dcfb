//! The kernel, and what this process may do with it.
use std::os::fd::AsFd as _;
use std::path::Path;

use aya::programs::Program;

use super::Finding;
use crate::attach;
use crate::dataplane::{TcMode, apart};
use crate::host::{self, Capabilities};
use crate::sys;

/// `proc`: where procfs is mounted.
pub fn version(proc: &Path) -> Finding {
    const CHECK: &str = "kernel";
    let release = std::fs::read_to_string(proc.join("sys/kernel/osrelease")).unwrap_or_default();
    let release = release.trim();
    let (major, minor) = host::QUICK_KERNEL;
    match numbers(release) {
        _ if host::check_kernel().is_err() => Finding::failed(
            CHECK,
            format!("Linux {release}"),
            format!("boot Linux {major}.{minor} or newer; nothing older than 6.1 is served"),
        ),
        Some(version) if version >= (major.into(), minor.into()) => Finding::ok(CHECK, format!("Linux {release}")),
        _ => Finding::warning(
            CHECK,
            format!(
                "Linux {release}: it waits for each backend set, so that a start with thousands of Services takes longer"
            ),
            format!("boot Linux {major}.{minor} or newer"),
        ),
    }
}

fn numbers(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

pub fn capabilities() -> Finding {
    const CHECK: &str = "capabilities";
    let capabilities = match host::capabilities() {
        Ok(capabilities) => capabilities,
        Err(error) => return Finding::failed(CHECK, format!("{error:#}"), "mount procfs at /proc"),
    };
    grade(capabilities)
}

fn grade(capabilities: Capabilities) -> Finding {
    const CHECK: &str = "capabilities";
    const GIVE: &str = "run it as root, or give it these capabilities as well";
    let missing = |wanted: &[(&str, Capabilities)]| -> Vec<String> {
        let absent = wanted.iter().filter(|(_, capability)| !capabilities.has(*capability));
        absent.map(|(name, _)| (*name).to_owned()).collect()
    };
    if !capabilities.may_run() {
        let missing = missing(&[
            ("NET_ADMIN", Capabilities::NET_ADMIN),
            ("BPF", Capabilities::BPF),
            ("PERFMON", Capabilities::PERFMON),
        ]);
        return Finding::failed(CHECK, format!("without {}", missing.join(", ")), GIVE);
    }
    let missing = missing(&[
        ("SYS_ADMIN (sets are read back, sockets of pods are terminated)", Capabilities::SYS_ADMIN),
        ("SYS_PTRACE (other processes' network namespaces)", Capabilities::SYS_PTRACE),
    ]);
    if missing.is_empty() {
        return Finding::ok(CHECK, "all that are needed");
    }
    Finding::warning(CHECK, format!("without {}", missing.join(", ")), GIVE)
}

/// `proc`: where procfs is mounted.
pub fn jit(proc: &Path) -> Finding {
    const CHECK: &str = "jit";
    match std::fs::read_to_string(proc.join("sys/net/core/bpf_jit_enable")).as_deref().map(str::trim) {
        Ok("0") => Finding::warning(
            CHECK,
            "net.core.bpf_jit_enable is 0: each packet costs several times as much",
            "sysctl -w net.core.bpf_jit_enable=1",
        ),
        Ok(_) => Finding::ok(CHECK, "programs are compiled"),
        // Only the first network namespace has the setting.
        Err(_) => Finding::ok(CHECK, "not told in this network namespace"),
    }
}

/// Loads the kernel part, maps and programs, apart from any that is in use: no list of features says as much. Types of
/// programs and maps, helpers and the verifier's limits are all tried by it.
///
/// `tc`: how they are to be attached to interfaces.
pub fn programs(tc: TcMode) -> Vec<Finding> {
    const CHECK: &str = "programs";
    let loaded = apart::alone().and_then(|mut ebpf| {
        // The verifier takes its time for each, and does several at once.
        std::thread::scope(|scope| {
            let mut loading = Vec::new();
            for (name, program) in ebpf.programs_mut() {
                let name = name.to_owned();
                loading.push(scope.spawn(move || attach::load_program(program).map_err(|error| error.context(name))));
            }
            loading.into_iter().try_for_each(|thread| thread.join().expect("loading a program does not panic"))
        })?;
        Ok(ebpf)
    });
    match loaded {
        Ok(ebpf) => {
            let classifier = ebpf.programs().find_map(|(_, program)| match program {
                Program::SchedClassifier(program) => program.fd().ok(),
                _ => None,
            });
            let has_tcx = classifier.is_some_and(|program| sys::has_tcx(program.as_fd()));
            let count = ebpf.programs().count();
            vec![Finding::ok(CHECK, format!("the kernel takes all {count}, and their maps")), attaching(tc, has_tcx)]
        }
        Err(error) => vec![Finding::failed(
            CHECK,
            format!("the kernel refuses the kernel part: {error:#}"),
            "see to the lines above first; else boot a newer kernel, with CONFIG_BPF_SYSCALL, CONFIG_CGROUP_BPF and \
             CONFIG_NET_CLS_BPF",
        )],
    }
}

fn attaching(tc: TcMode, has_tcx: bool) -> Finding {
    const CHECK: &str = "tc";
    match (tc, has_tcx) {
        (TcMode::Tcx, false) => Finding::failed(CHECK, "--tc tcx: this kernel has no tcx", "--tc auto, or Linux 6.6"),
        (TcMode::Auto | TcMode::Tcx, true) => Finding::ok(CHECK, "tcx"),
        (TcMode::Auto | TcMode::Clsact, _) => Finding::ok(CHECK, "filters on a clsact qdisc"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Grade;
    use rstest::rstest;

    #[rstest]
    #[case("6.12.48+deb13-cloud-amd64", Some((6, 12)))]
    #[case("7.0.0-rc1", Some((7, 0)))]
    #[case("6", None)]
    #[case("", None)]
    fn a_release_begins_with_two_numbers(#[case] release: &str, #[case] expected: Option<(u32, u32)>) {
        assert_eq!(numbers(release), expected);
    }

    #[rstest]
    #[case::root(Capabilities(u64::MAX), Grade::Ok, "all that are needed")]
    #[case::none(Capabilities(0), Grade::Failed, "without NET_ADMIN, BPF, PERFMON")]
    #[case::network_only(Capabilities::NET_ADMIN, Grade::Failed, "without BPF, PERFMON")]
    #[case::no_perfmon(Capabilities(1 << 12 | 1 << 39), Grade::Failed, "without PERFMON")]
    #[case::least(Capabilities(1 << 12 | 1 << 38 | 1 << 39), Grade::Warning, "without SYS_ADMIN (")]
    fn what_is_missing_is_named(#[case] capabilities: Capabilities, #[case] result: Grade, #[case] found: &str) {
        let finding = grade(capabilities);
        assert_eq!(finding.result, result, "{finding:?}");
        assert!(finding.found.starts_with(found), "{finding:?}");
    }
}
