//! kube-apiserver, etcd, kube-proxy, kubectl and helm: where envtest looks for them, else built from their Go modules, once. So is
//! promtool.
use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::go;

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

/// All that a cluster is made of, whether they are built or not.
pub fn all() -> Result<Vec<PathBuf>> {
    let assets = env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from);
    let names = PROGRAMS.map(|(name, _)| name).into_iter().chain([KUBE_PROXY.0, KUBECTL.0]);
    let versioned = versioned()?;
    let place = |name: &str| {
        let asset = assets.as_ref().map(|assets| assets.join(name)).filter(|path| path.is_file());
        asset.unwrap_or_else(|| versioned.join(name))
    };
    Ok(names.map(place).collect())
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
    let name = format!("helm-{}", go::version(&requirements()?, HELM)?);
    ensure(&versioned()?, (&name, &format!("{HELM}/cmd/helm")))
}

/// Prometheus' own judge of metrics and rules.
pub fn promtool() -> Result<PathBuf> {
    let requirements =
        fs::read_to_string(Path::new(PROMTOOL_MODULE).join("go.mod")).context("cannot read tests/promtool/go.mod")?;
    let path = versioned()?.join(format!("promtool-{}", go::version(&requirements, PROMETHEUS)?));
    // Without the clouds that Prometheus finds its targets by.
    go::build(PROMTOOL_MODULE.as_ref(), &["-tags", "remove_all_sd"], &format!("{PROMETHEUS}/cmd/promtool"), &path)?;
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
    go::version(&requirements()?, "k8s.io/kubernetes").map(str::to_owned)
}

fn versioned() -> Result<PathBuf> {
    let directory = go::cache()?.join("control-plane").join(stamp(&requirements()?)?);
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    Ok(directory)
}

fn requirements() -> Result<String> {
    fs::read_to_string(Path::new(MODULE).join("go.mod")).context("cannot read tests/control-plane/go.mod")
}

fn ensure(directory: &Path, (name, package): (&str, &str)) -> Result<PathBuf> {
    let path = directory.join(name);
    go::build(MODULE.as_ref(), &[], package, &path)
        .context("the control plane is built with Go; these tests are left out with --skip control-plane")?;
    Ok(path)
}

/// Other versions are other directories.
fn stamp(requirements: &str) -> Result<String> {
    let kubernetes = go::version(requirements, "k8s.io/kubernetes")?;
    Ok(format!("kubernetes-{kubernetes}-etcd-{}", go::version(requirements, "go.etcd.io/etcd/server/v3")?))
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
