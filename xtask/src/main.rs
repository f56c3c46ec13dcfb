//! `cargo xtask`: everything that is done with this repository, a file a subcommand.
mod bench;
mod build;
mod cluster;
mod fuzz;
mod host;
mod kind;
mod lint;
mod parity;
mod run;
mod setup;
mod step;
mod test;
mod vm;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Build, run and test svc.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Options {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    Setup(setup::Options),
    Build(build::Options),
    Run(run::Options),
    Test(test::Options),
    Parity(parity::Options),
    Bench(bench::Options),
    Kind(kind::Options),
    Cluster(cluster::Options),
    E2e(cluster::EndToEnd),
    Fuzz(fuzz::Options),
    Vm(vm::Options),
    Lint(lint::Options),
}

fn main() -> ExitCode {
    match dispatch(Options::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(task: Task) -> Result<()> {
    match task {
        Task::Setup(options) => setup::run(&options),
        Task::Build(options) => build::run(&options),
        Task::Run(options) => run::run(&options),
        Task::Test(options) => test::run(&options),
        Task::Parity(options) => parity::run(&options),
        Task::Bench(options) => bench::run(&options),
        Task::Kind(options) => kind::run(&options),
        Task::Cluster(options) => cluster::run(&options),
        Task::E2e(options) => cluster::run_e2e(&options),
        Task::Fuzz(options) => fuzz::run(&options),
        Task::Vm(options) => vm::run(&options),
        Task::Lint(options) => lint::run(&options),
    }
}
