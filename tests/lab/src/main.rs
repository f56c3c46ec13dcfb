//! The lab's program: the demonstration, and what runs on the lab's hosts.
mod contain;
mod demo;
mod enter;

use std::net::{SocketAddr, TcpListener};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use svc_lab::{claim, client, control_plane, probe, server};

/// A lab of network namespaces for svc. It needs root.
#[derive(Parser)]
#[command(name = "svc-lab")]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::Options),
    Serve(server::Options),
    Client(client::Options),
    /// Answer what stands on the standard input, a JSON array of questions, by one of verdicts.
    Probe,
    Enter(enter::Options),
    Contain(contain::Options),
    /// Listen for TCP connections there, and print what becomes of it: free, or why not.
    Bind {
        address: SocketAddr,
    },
    /// Remove what killed labs have left.
    Clean,
    /// Build kube-apiserver, etcd, kube-proxy, kubectl and helm where they are missing, and print the first one's directory.
    ControlPlane,
}

fn main() -> ExitCode {
    match dispatch(Options::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: Command) -> Result<ExitCode> {
    match command {
        Command::Demo(options) => return demo::run(&options),
        Command::Serve(options) => server::run(&options)?,
        Command::Client(options) => client::run(&options)?,
        Command::Probe => probe::run()?,
        Command::Enter(options) => enter::run(&options)?,
        Command::Contain(options) => contain::run(&options)?,
        Command::Bind { address } => match TcpListener::bind(address) {
            Ok(_) => println!("free"),
            Err(error) => println!("{:?}", error.kind()),
        },
        Command::Clean => claim::sweep()?,
        Command::ControlPlane => {
            for binary in [control_plane::kube_proxy_binary, control_plane::kubectl_binary, control_plane::helm_binary]
            {
                binary()?;
            }
            println!("{}", control_plane::binaries_directory()?.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}
