//! Where a lab's agents take their objects from: a folder of manifests, or a real API server. A scenario runs on both.
use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::control_plane::ControlPlane;
use crate::manifests::Manifests;
use crate::topology::Lab;

pub enum Source {
    Directory(PathBuf),
    ControlPlane(ControlPlane),
}

impl Source {
    pub fn directory(lab: &Lab) -> Self {
        Source::Directory(lab.directory().join("manifests"))
    }

    /// Starts one, which takes a few seconds.
    pub fn control_plane(lab: &mut Lab) -> Result<Self> {
        Ok(Source::ControlPlane(ControlPlane::start(lab)?))
    }

    /// Where it is one.
    pub fn api_server(&self) -> Result<&ControlPlane> {
        match self {
            Source::ControlPlane(control_plane) => Ok(control_plane),
            Source::Directory(_) => bail!("kube-proxy takes its objects from an API server only"),
        }
    }

    /// Makes its objects these.
    pub fn publish(&mut self, lab: &Lab, manifests: &Manifests) -> Result<()> {
        match self {
            Source::Directory(directory) => manifests.write(directory),
            Source::ControlPlane(control_plane) => control_plane.publish(lab, manifests),
        }
    }

    /// What tells the agent of it.
    pub fn arguments(&self) -> Vec<String> {
        match self {
            Source::Directory(directory) => vec!["--manifests".to_owned(), directory.display().to_string()],
            Source::ControlPlane(control_plane) => control_plane.agent_arguments(),
        }
    }
}
