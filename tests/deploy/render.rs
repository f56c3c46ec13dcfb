//! The manifests, as `kubectl kustomize` and `helm template` make them.
use std::fs;
use std::process::Command;

use serde_json::Value;
use svc_lab::control_plane::{helm_binary, kubectl_binary};
use svc_lab::manifests;

use crate::installed::path;

/// Of a directory below deploy/.
pub(crate) fn kustomize(directory: &str) -> Vec<Value> {
    objects(Command::new(kubectl_binary().unwrap()).args(["kustomize", &path(directory)])).unwrap()
}

/// Of a kustomization beside those in deploy/kustomize.
pub(crate) fn kustomization(kustomization: &Value) -> Vec<Value> {
    let directory = tempfile::tempdir().unwrap();
    let status = Command::new("cp").arg("-r").arg(path("kustomize")).arg(directory.path()).status().unwrap();
    assert!(status.success());
    let place = directory.path().join("kustomize");
    fs::write(place.join("kustomization.yaml"), kustomization.to_string()).unwrap();
    objects(Command::new(kubectl_binary().unwrap()).arg("kustomize").arg(place)).unwrap()
}

/// The chart, with these arguments.
pub(crate) fn helm(arguments: &[&str]) -> Result<Vec<Value>, String> {
    let chart = path("chart");
    let mut command = Command::new(helm_binary().unwrap());
    objects(command.args(["template", "svc", &chart, "--namespace", "kube-system"]).args(arguments))
}

fn objects(command: &mut Command) -> Result<Vec<Value>, String> {
    let output = command.output().unwrap();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let objects = manifests::parse(&String::from_utf8(output.stdout).unwrap()).map_err(|error| format!("{error:#}"))?;
    Ok(objects.into_iter().filter(|object| !object.is_null()).collect())
}
