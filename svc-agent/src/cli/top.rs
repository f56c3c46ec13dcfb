//! `svc-agent top`: services and backends by their flows, again and again, on a screen.
use std::collections::BTreeMap;
use std::io::{self, IsTerminal as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use svc_common::map::{Traffic, cluster_set};

use crate::dataplane::State;
use crate::go_duration;
use crate::inspect::{self, Pins};
use crate::top::model::{Input, Model, Sort};
use crate::top::rates::{Carried, Counts, Rates, Sample};
use crate::top::view;

/// Less would be work for nothing: the kernel notes a flow's packets every two seconds.
const SHORTEST: Duration = Duration::from_millis(500);

#[derive(clap::Args, Debug)]
pub struct Args {
    /// Between two looks at the kernel, 500ms or longer.
    #[arg(long, value_name = "DURATION", value_parser = go_duration::parse, default_value = "2s")]
    interval: Duration,

    /// Where maps, programs and links are pinned.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/svc")]
    bpffs: PathBuf,
}

/// # Errors
/// Where there is no terminal, or the pins cannot be read.
pub fn run(args: &Args) -> anyhow::Result<()> {
    ensure!(args.interval >= SHORTEST, "--interval is not {SHORTEST:?} or longer");
    ensure!(
        io::stdout().is_terminal() && io::stdin().is_terminal(),
        "top needs a terminal: `svc-agent flows -o json` is for scripts"
    );
    let pins = Pins::open(&args.bpffs)?;
    let mut eye = Eye { state: pins.state()?, pins, looks: 0 };
    let mut rates = Rates::default();
    let mut model = Model::default();
    let mut looked = Instant::now();
    model.show(rates.next(eye.look()?, args.interval));
    let mut terminal = ratatui::try_init().context("setting up the terminal")?;
    let result = (|| {
        while !model.quit {
            terminal.draw(|frame| view::draw(frame, &model))?;
            let left = args.interval.saturating_sub(looked.elapsed());
            if event::poll(left)? {
                if let Some(input) = input(&event::read()?) {
                    model.press(input);
                }
            } else {
                let elapsed = looked.elapsed();
                looked = Instant::now();
                model.show(rates.next(eye.look()?, elapsed));
            }
        }
        Ok(())
    })();
    ratatui::restore();
    result
}

/// Services change less often than flows, and reading ten thousand of them costs a tenth of a second.
const LOOKS_A_STATE: u32 = 5;

struct Eye {
    pins: Pins,
    state: State,
    looks: u32,
}

impl Eye {
    fn look(&mut self) -> anyhow::Result<Sample> {
        self.looks += 1;
        if self.looks.is_multiple_of(LOOKS_A_STATE) {
            self.state = self.pins.state()?;
        }
        let connections: BTreeMap<u32, u64> = self.pins.connections()?.into_iter().collect();
        let mut services: BTreeMap<String, Counts> = BTreeMap::new();
        for (id, name) in self.state.port_names() {
            let counts = services.entry(name.service.to_string()).or_default();
            counts.backends += self.state.backend_set(cluster_set(id)).len();
            counts.connections += connections.get(&id).copied().unwrap_or(0);
        }
        let carried = self.pins.traffic()?.map(|traffic| {
            let of = |(id, traffic): (u32, Traffic)| {
                let backend = self.state.backends.get(&id)?;
                let service = self.state.port_name(backend.service)?.service.to_string();
                let bytes = traffic.to_backend + traffic.from_backend;
                Some((id, Carried { service, backend: inspect::backend_text(backend), bytes }))
            };
            traffic.into_iter().filter_map(of).collect()
        });
        Ok(Sample { flows: self.pins.flows_of(&self.state)?, counters: self.pins.counters()?, services, carried })
    }
}

fn input(event: &Event) -> Option<Input> {
    let Event::Key(KeyEvent { code, modifiers, kind: KeyEventKind::Press | KeyEventKind::Repeat, .. }) = event else {
        return None;
    };
    if modifiers.contains(KeyModifiers::CONTROL) {
        return (*code == KeyCode::Char('c')).then_some(Input::Quit);
    }
    Some(match code {
        KeyCode::Char('j') | KeyCode::Down => Input::Down,
        KeyCode::Char('k') | KeyCode::Up => Input::Up,
        KeyCode::Char('g') | KeyCode::Home => Input::Top,
        KeyCode::Char('G') | KeyCode::End => Input::Bottom,
        KeyCode::Enter | KeyCode::Char('l') | KeyCode::Right => Input::Enter,
        KeyCode::Esc | KeyCode::Char('h') | KeyCode::Left | KeyCode::Backspace => Input::Back,
        KeyCode::Char('s') => Input::NextSort,
        KeyCode::Char('f') => Input::Sort(Sort::Flows),
        KeyCode::Char('n') => Input::Sort(Sort::New),
        KeyCode::Char('b') => Input::Sort(Sort::Bytes),
        KeyCode::Char('a') => Input::Sort(Sort::Name),
        KeyCode::Char('q') => Input::Quit,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case(KeyCode::Char('j'), KeyModifiers::NONE, Some(Input::Down))]
    #[case(KeyCode::Up, KeyModifiers::NONE, Some(Input::Up))]
    #[case(KeyCode::Char('G'), KeyModifiers::SHIFT, Some(Input::Bottom))]
    #[case(KeyCode::Char('c'), KeyModifiers::CONTROL, Some(Input::Quit))]
    #[case(KeyCode::Char('j'), KeyModifiers::CONTROL, None)]
    #[case(KeyCode::Char('x'), KeyModifiers::NONE, None)]
    fn keys_mean_what_they_do_in_vi(
        #[case] code: KeyCode,
        #[case] modifiers: KeyModifiers,
        #[case] expected: Option<Input>,
    ) {
        assert_eq!(input(&Event::Key(KeyEvent::new(code, modifiers))), expected);
    }
}
