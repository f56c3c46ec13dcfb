//! Upstream's end-to-end tests, and where their verdicts differ from those recorded with kube-proxy.
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use svc_lab::control_plane::kubectl_binary;
use svc_lab::go;

use crate::image::Purpose;
use crate::network::CONTROL_PLANE;
use crate::programs::{Programs, source};
use crate::proxy::Proxy;
use crate::state::Cluster;
use crate::up;

const FOCUS: &str = r"\[sig-network\]";
/// What wants kube-proxy as a pod that may be broken, a cloud's load balancers, network policies, or a feature that is no
/// part of every cluster, but for dual stack (a regular expression of Go has no lookahead).
const SKIP: &str = r"\[Disruptive\]|LoadBalancers|Netpol|\[Feature:([^I]|I[^P])";

/// Run Kubernetes' own end-to-end tests, and compare with kube-proxy's verdicts.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Which tests, a regular expression.
    #[arg(long, default_value = FOCUS)]
    pub(crate) focus: String,
    /// And which of them not.
    #[arg(long, default_value = SKIP)]
    skip: String,
    /// How many at once.
    #[arg(long, default_value_t = 4)]
    processes: u32,
    /// What serves Services, where the cluster is not up yet.
    #[arg(long, value_enum, default_value_t = Proxy::Svc)]
    proxy: Proxy,
    /// Try a test that fails as many times.
    #[arg(long, default_value_t = 1)]
    attempts: u32,
    /// After which ginkgo ends it all, as Go writes durations.
    #[arg(long, default_value = "2h")]
    timeout: String,
    /// Record the verdicts as kube-proxy's.
    #[arg(long)]
    record: bool,
}

/// What passes with kube-proxy only, by design: docs/parity.md, Upstream's end-to-end tests.
const BY_DESIGN: [&str; 1] = ["[sig-network] KubeProxy should set TCP CLOSE_WAIT timeout [Privileged]"];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Passed,
    Failed,
    Skipped,
}

impl Verdict {
    const ALL: [(Verdict, &'static str); 3] =
        [(Verdict::Passed, "PASS"), (Verdict::Failed, "FAIL"), (Verdict::Skipped, "SKIP")];

    fn word(self) -> &'static str {
        Self::ALL.into_iter().find(|(verdict, _)| *verdict == self).map_or("", |(_, word)| word)
    }
}

/// By the test's name.
type Verdicts = BTreeMap<String, Verdict>;

/// Has svc installed from deploy/ on a cluster of its own, and tries what every conformant cluster passes of Services.
pub(crate) fn run_conformance(cluster: &Cluster) -> Result<()> {
    let options = Options {
        focus: r"\[sig-network\] Services .*\[Conformance\]".to_owned(),
        skip: SKIP.to_owned(),
        processes: 4,
        proxy: Proxy::Svc,
        // On a machine that does other things as well, some run into their limits of time.
        attempts: 3,
        timeout: "20m".to_owned(),
        record: false,
    };
    let _turn = cluster.lock()?;
    // Of one that was killed.
    cluster.down()?;
    let result = run_on(cluster, &options, Purpose::Conformance);
    if result.is_err() {
        // It says more than the error, where there is a cluster at all.
        let _ = up::status(cluster);
    }
    let down = cluster.down();
    result.and(down)
}

/// The cluster is started where there is none, and stays.
pub(crate) fn run(cluster: &Cluster, options: &Options) -> Result<()> {
    run_on(cluster, options, Purpose::Any)
}

fn run_on(cluster: &Cluster, options: &Options, with: Purpose) -> Result<()> {
    if options.record && options.proxy != Proxy::Kube {
        bail!("what is recorded is kube-proxy's: --proxy kube-proxy");
    }
    up::up(cluster, options.proxy, with)?;
    let directory = go::cache()?.join("cluster/e2e").join(cluster.name());
    fs::create_dir_all(&directory)?;
    let start = Instant::now();
    let verdicts = judge(cluster, options, &directory)?;
    let took = start.elapsed().as_secs_f32();
    let count = |wanted| verdicts.values().filter(|verdict| **verdict == wanted).count();
    println!(
        "{} tests in {took:.0} s: {} passed, {} failed, {} skipped; {}",
        verdicts.len(),
        count(Verdict::Passed),
        count(Verdict::Failed),
        count(Verdict::Skipped),
        directory.display()
    );
    if verdicts.is_empty() {
        bail!("no test is of this focus: {}", options.focus);
    }
    if options.record {
        return record(verdicts);
    }
    compare(&verdicts, &recorded()?)
}

fn judge(cluster: &Cluster, options: &Options, directory: &Path) -> Result<Verdicts> {
    let programs = Programs::ensure()?;
    let report = directory.join("report.json");
    // Of an earlier run.
    let _ = fs::remove_file(&report);
    let mut ginkgo = cluster.command(CONTROL_PLANE, programs.built("ginkgo"))?;
    ginkgo
        .args(["--no-color", "--silence-skips"])
        .arg(format!("--timeout={}", options.timeout))
        .arg(format!("--procs={}", options.processes))
        .arg(format!("--flake-attempts={}", options.attempts))
        .arg(format!("--focus={}", options.focus))
        .arg(format!("--skip={}", options.skip))
        .arg(format!("--output-dir={}", directory.display()))
        .arg("--json-report=report.json")
        .arg(programs.built("e2e.test"))
        .arg("--")
        .arg(format!("--kubeconfig={}", cluster.kubeconfig("admin").display()))
        .arg(format!("--kubectl-path={}", kubectl_binary()?.display()))
        .args(["--provider=skeleton", "--num-nodes=3", "--dns-domain=cluster.local", "--node-os-distro=debian"]);
    // A test that failed is in the report; what is shown meanwhile is ginkgo's own.
    let status = ginkgo.status().context("cannot start ginkgo")?;
    let file = File::open(&report).with_context(|| format!("ginkgo ended with {status}, and has no report"))?;
    let suites: Value = serde_json::from_reader(std::io::BufReader::new(file))?;
    Ok(verdicts(&suites))
}

fn verdicts(suites: &Value) -> Verdicts {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let reports = list(suites).into_iter().flat_map(|suite| list(&suite["SpecReports"]));
    let mut verdicts = Verdicts::new();
    for report in reports.filter(|report| report["LeafNodeType"] == "It") {
        let verdict = match report["State"].as_str() {
            Some("passed") => Verdict::Passed,
            // By itself; one that is not of the focus has no message.
            Some("skipped") if report["Failure"]["Message"].as_str().is_some_and(|text| !text.is_empty()) => {
                Verdict::Skipped
            }
            Some("skipped" | "pending") => continue,
            _ => Verdict::Failed,
        };
        let mut words = list(&report["ContainerHierarchyTexts"]);
        words.push(report["LeafNodeText"].clone());
        let name: Vec<_> = words.iter().filter_map(Value::as_str).collect();
        verdicts.insert(name.join(" "), verdict);
    }
    verdicts
}

fn recording() -> PathBuf {
    source("recorded/kube-proxy.txt")
}

fn recorded() -> Result<Verdicts> {
    let text = fs::read_to_string(recording()).context("cannot read what was recorded with kube-proxy")?;
    Ok(parse(&text))
}

fn parse(text: &str) -> Verdicts {
    let rows = text.lines().filter_map(|line| {
        let (word, name) = line.split_once(' ')?;
        let (verdict, _) = Verdict::ALL.into_iter().find(|(_, known)| *known == word)?;
        Some((name.to_owned(), verdict))
    });
    rows.collect()
}

/// Those of other tests stay.
fn record(verdicts: Verdicts) -> Result<()> {
    let text = fs::read_to_string(recording()).unwrap_or_default();
    let mut all = parse(&text);
    all.extend(verdicts);
    let mut lines: Vec<_> = text.lines().filter(|line| line.starts_with('#')).map(str::to_owned).collect();
    lines.extend(all.iter().map(|(name, verdict)| format!("{} {name}", verdict.word())));
    fs::write(recording(), lines.join("\n") + "\n")?;
    println!("recorded in {}; its first line says with what", recording().display());
    Ok(())
}

/// Prints the tests whose verdicts differ, and fails where one passes with kube-proxy only.
fn compare(here: &Verdicts, recorded: &Verdicts) -> Result<()> {
    let rows: Vec<_> = here.iter().filter(|(name, verdict)| recorded.get(*name) != Some(verdict)).collect();
    if rows.is_empty() {
        println!("no verdict differs from those recorded with kube-proxy");
        return Ok(());
    }
    println!("recorded  here  test");
    for (name, verdict) in &rows {
        let theirs = recorded.get(*name).map_or("none", |verdict| verdict.word());
        let why = if BY_DESIGN.contains(&name.as_str()) { " (docs/parity.md)" } else { "" };
        println!("{theirs:<8}  {}  {name}{why}", verdict.word());
    }
    let worse = worse(here, recorded);
    if !worse.is_empty() {
        bail!("{} tests pass with kube-proxy, and do not here", worse.len());
    }
    Ok(())
}

fn worse<'a>(here: &'a Verdicts, recorded: &Verdicts) -> Vec<&'a str> {
    let passed = |name: &str| recorded.get(name) == Some(&Verdict::Passed) && !BY_DESIGN.contains(&name);
    let rows = here.iter().filter(|(name, verdict)| passed(name) && **verdict != Verdict::Passed);
    rows.map(|(name, _)| name.as_str()).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_report_is_read_without_the_tests_that_are_out_of_focus() {
        let spec = |text, state, message| {
            json!({
                "LeafNodeType": "It", "LeafNodeText": text, "ContainerHierarchyTexts": ["[sig-network]", "Services"],
                "State": state, "Failure": { "Message": message },
            })
        };
        let suites = json!([{ "SpecReports": [
            spec("work", "passed", ""), spec("break", "timedout", "late"), spec("rest", "skipped", ""),
            spec("give up", "skipped", "skipped - only GCE"),
            { "LeafNodeType": "SynchronizedBeforeSuite", "State": "passed" },
        ] }]);
        let words: Vec<_> = verdicts(&suites).into_iter().map(|(name, verdict)| (name, verdict.word())).collect();
        let named = |name: &str, word| (format!("[sig-network] Services {name}"), word);
        assert_eq!(words, [named("break", "FAIL"), named("give up", "SKIP"), named("work", "PASS")]);
    }

    #[test]
    fn worse_is_what_passes_with_kube_proxy_only() {
        let recorded = parse("# with kube-proxy\nPASS a\nPASS b\nFAIL c\nSKIP d\n");
        assert_eq!(worse(&parse("PASS a\nFAIL b\nFAIL c\nFAIL d\nFAIL e\n"), &recorded), ["b"]);
        assert_eq!(worse(&parse("SKIP a\n"), &recorded), ["a"]);
    }

    #[test]
    fn what_differs_by_design_is_recorded_as_passed() {
        let recorded = recorded().unwrap();
        assert!(BY_DESIGN.iter().all(|name| recorded.get(*name) == Some(&Verdict::Passed)));
        let here = BY_DESIGN.map(|name| (name.to_owned(), Verdict::Failed)).into();
        assert!(worse(&here, &recorded).is_empty());
    }

    #[test]
    fn kube_proxys_verdicts_are_recorded() {
        let recorded = recorded().unwrap();
        let passed = recorded.values().filter(|verdict| **verdict == Verdict::Passed).count();
        assert_eq!((recorded.len(), passed), (158, 153));
    }
}
