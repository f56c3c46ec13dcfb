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

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENTS: [&str; 6] = [
        include_str!("../../README.md"),
        include_str!("../../CONTRIBUTING.md"),
        include_str!("../../docs/benchmarks.md"),
        include_str!("../../docs/operations.md"),
        include_str!("../../docs/parity.md"),
        include_str!("../../deploy/kind/README.md"),
    ];

    /// Lines of indented blocks, and what stands between backticks.
    fn code(document: &'static str) -> impl Iterator<Item = &'static str> {
        let is_block = |line: &&str| line.starts_with("    ");
        let blocks = document.lines().filter(is_block).map(str::trim);
        blocks.chain(
            document.lines().filter(move |line| !is_block(line)).flat_map(|line| line.split('`').skip(1).step_by(2)),
        )
    }

    #[test]
    fn every_command_of_the_documents_is_one() {
        let mut seen = 0;
        for line in DOCUMENTS.into_iter().flat_map(code).filter(|line| line.starts_with("cargo xtask ")) {
            let line = line.split(" #").next().unwrap_or_default().replace(['[', ']'], "").replace("...", "");
            // A number stands for what is to be put in.
            let is_placeholder = |word: &str| word.chars().all(|character| character.is_ascii_uppercase());
            let words = line.split_whitespace().skip(1).map(|word| if is_placeholder(word) { "1" } else { word });
            if let Err(error) = Options::try_parse_from(words) {
                panic!("{line}: {error}");
            }
            seen += 1;
        }
        assert!(seen > 15, "{seen}");
    }
}
