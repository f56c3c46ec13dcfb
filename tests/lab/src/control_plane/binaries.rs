//! kube-apiserver, etcd, kube-proxy, kubectl and helm: where envtest looks for them, else built from their Go modules, once. So is
//! promtool.
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

const MODULE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../control-plane");
const PROGRAMS: [(&str, &str); 2] =
    [("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"), ("etcd", "go.etcd.io/etcd/server/v3")];
const KUBE_PROXY: (&str, &str) = ("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy");
const KUBECTL: (&str, &str) = ("kubectl", "k8s.io/kubernetes/cmd/kubectl");
const HELM: &str = "helm.sh/helm/v4";

/// A module of its own: Prometheus and Kubernetes want different versions of what both use.
const PROMTOOL_MODULE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../promtool");
const PROMETHEUS: &str = "github.com/prometheus/prometheus";

/// That of kube-apiserver and etcd. Builds them where they are missing, which takes minutes.
pub fn directory() -> Result<PathBuf> {
    if let Some(assets) = env::var_os("KUBEBUILDER_ASSETS") {
        return Ok(assets.into());
    }
    let directory = versioned()?;
    for program in PROGRAMS {
        ensure(&directory, program)?;
    }
    Ok(directory)
}

/// kube-proxy, which envtest does not bring: built where it is not beside the others.
pub fn kube_proxy() -> Result<PathBuf> {
    beside(KUBE_PROXY)
}

/// kubectl, with kustomize inside.
pub fn kubectl() -> Result<PathBuf> {
    beside(KUBECTL)
}

/// helm, which has versions of its own.
pub fn helm() -> Result<PathBuf> {
    let name = format!("helm-{}", version(&requirements()?, HELM)?);
    ensure(&versioned()?, (&name, &format!("{HELM}/cmd/helm")))
}

/// Prometheus' own judge of metrics and rules.
pub fn promtool() -> Result<PathBuf> {
    let requirements =
        fs::read_to_string(Path::new(PROMTOOL_MODULE).join("go.mod")).context("cannot read tests/promtool/go.mod")?;
    let path = versioned()?.join(format!("promtool-{}", version(&requirements, PROMETHEUS)?));
    if !path.exists() {
        // Without the clouds that Prometheus finds its targets by.
        build(PROMTOOL_MODULE, &["-tags", "remove_all_sd"], &format!("{PROMETHEUS}/cmd/promtool"), &path)?;
    }
    Ok(path)
}

fn beside(program: (&str, &str)) -> Result<PathBuf> {
    let assets = env::var_os("KUBEBUILDER_ASSETS").map(|assets| Path::new(&assets).join(program.0));
    match assets.filter(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => ensure(&versioned()?, program),
    }
}

/// The version of Kubernetes that is built.
pub fn kubernetes_version() -> Result<String> {
    version(&requirements()?, "k8s.io/kubernetes").map(str::to_owned)
}

fn versioned() -> Result<PathBuf> {
    let directory = cache()?.join(stamp(&requirements()?)?);
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    Ok(directory)
}

fn requirements() -> Result<String> {
    fs::read_to_string(Path::new(MODULE).join("go.mod")).context("cannot read tests/control-plane/go.mod")
}

fn ensure(directory: &Path, (name, package): (&str, &str)) -> Result<PathBuf> {
    let path = directory.join(name);
    if !path.exists() {
        build(MODULE, &[], package, &path)?;
    }
    Ok(path)
}

fn build(module: &str, flags: &[&str], package: &str, target: &Path) -> Result<()> {
    let name = target.file_name().unwrap_or_default().display().to_string();
    eprintln!("  building {name}; this happens once and takes minutes");
    let start = Instant::now();
    // Under its final name only when it is whole: a build may be interrupted, or run twice at once.
    let unfinished = target.with_file_name(format!("{name}.{}", std::process::id()));
    let status = Command::new("go")
        .args(["build", "-mod=readonly", "-buildvcs=false", "-trimpath", "-ldflags", "-s -w"])
        .args(flags)
        .arg("-o")
        .args([unfinished.as_os_str(), package.as_ref()])
        .current_dir(module)
        .env("CGO_ENABLED", "0")
        .status()
        .context("cannot start go: the control plane is built with Go 1.26; install it, or leave these tests out with --skip control-plane")?;
    if !status.success() {
        bail!("building {package} ended with {status}");
    }
    fs::rename(unfinished, target)?;
    eprintln!("  {name} built in {:.0} s", start.elapsed().as_secs_f32());
    Ok(())
}

fn cache() -> Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME") {
        Some(directory) => directory.into(),
        None => PathBuf::from(env::var_os("HOME").context("HOME is not set")?).join(".cache"),
    };
    Ok(base.join("svc/control-plane"))
}

/// Other versions are other directories.
fn stamp(requirements: &str) -> Result<String> {
    let kubernetes = version(requirements, "k8s.io/kubernetes")?;
    Ok(format!("kubernetes-{kubernetes}-etcd-{}", version(requirements, "go.etcd.io/etcd/server/v3")?))
}

fn version<'a>(requirements: &'a str, module: &str) -> Result<&'a str> {
    let line = requirements.lines().find(|line| {
        let words: Vec<&str> = line.trim_start_matches("require").split_whitespace().collect();
        words.len() >= 2 && words[0] == module && words[1].starts_with('v')
    });
    line.and_then(|line| line.split_whitespace().find(|word| word.starts_with('v')))
        .with_context(|| format!("go.mod requires no {module}"))
}

#[cfg(test)]
mod tests {
    use super::stamp;

    #[test]
    fn the_stamp_names_both_versions() {
        let requirements = "module m\nreplace k8s.io/api => k8s.io/api v0.36.1\nrequire k8s.io/kubernetes v1.36.1\n\
                            require (\n\tgo.etcd.io/etcd/server/v3 v3.6.8 // indirect\n)\n";
        assert_eq!(stamp(requirements).unwrap(), "kubernetes-v1.36.1-etcd-v3.6.8");
    }
}
