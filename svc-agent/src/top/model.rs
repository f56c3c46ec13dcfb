//! What is shown and what is chosen, and how keys change it.
use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::rates::{Load, Picture};

/// What the lines are sorted by.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Sort {
    #[default]
    Flows,
    New,
    Bytes,
    Name,
}

impl Sort {
    pub const fn label(self) -> &'static str {
        match self {
            Sort::Flows => "flows",
            Sort::New => "new/s",
            Sort::Bytes => "bytes/s",
            Sort::Name => "name",
        }
    }

    const fn next(self, counts_bytes: bool) -> Self {
        match self {
            Sort::Flows => Sort::New,
            Sort::New if counts_bytes => Sort::Bytes,
            Sort::New | Sort::Bytes => Sort::Name,
            Sort::Name => Sort::Flows,
        }
    }
}

/// What is looked at.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Page {
    #[default]
    Services,
    /// The backends and flows of this one.
    Service(String),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Input {
    Up,
    Down,
    Top,
    Bottom,
    Enter,
    Back,
    NextSort,
    Sort(Sort),
    Quit,
}

#[derive(Clone, PartialEq, Debug)]
pub struct Line {
    pub name: String,
    /// Of a service; none of a backend.
    pub backends: Option<usize>,
    pub load: Load,
}

#[derive(Debug, Default)]
pub struct Model {
    pub page: Page,
    pub sort: Sort,
    pub picture: Picture,
    /// The line that is chosen, by name: lines move as their figures change.
    pub chosen: Option<String>,
    pub quit: bool,
}

impl Model {
    pub fn show(&mut self, picture: Picture) {
        self.picture = picture;
    }

    pub fn counts_bytes(&self) -> bool {
        self.picture.carried.is_some()
    }

    /// The services, or the backends of the one that is looked at.
    pub fn lines(&self) -> Vec<Line> {
        let mut lines: Vec<Line> = match &self.page {
            Page::Services => {
                let mut loads = self.picture.loads(|flow| flow.service.clone());
                let bytes = self.picture.carried.as_ref().map(|carried| {
                    let mut bytes: BTreeMap<&str, f64> = BTreeMap::new();
                    carried.iter().for_each(|((service, _), rate)| *bytes.entry(service).or_default() += rate);
                    bytes
                });
                let services = self.picture.services.iter();
                services
                    .map(|(name, (backends, connections))| Line {
                        name: name.clone(),
                        backends: Some(*backends),
                        load: Load {
                            new_a_second: *connections,
                            bytes_a_second: bytes
                                .as_ref()
                                .map(|bytes| bytes.get(name.as_str()).copied().unwrap_or_default()),
                            ..loads.remove(name).unwrap_or_default()
                        },
                    })
                    .collect()
            }
            Page::Service(service) => {
                let of_service = self.picture.loads(|flow| {
                    (flow.service.as_ref() == Some(service)).then(|| format!("{} {}", flow.protocol, flow.backend))
                });
                let bytes = |backend: &str| {
                    let carried = self.picture.carried.as_ref()?;
                    Some(carried.get(&(service.clone(), backend.to_owned())).copied().unwrap_or_default())
                };
                let lines = of_service.into_iter().map(|(name, load)| {
                    let load = Load { bytes_a_second: bytes(&name), ..load };
                    Line { name, backends: None, load }
                });
                lines.collect()
            }
        };
        // By name among equals, so that lines stay where they are.
        match self.sort {
            Sort::Flows => lines.sort_by_key(|line| Reverse(line.load.flows)),
            Sort::New => lines.sort_by(|one, other| other.load.new_a_second.total_cmp(&one.load.new_a_second)),
            Sort::Bytes => {
                let bytes = |line: &Line| line.load.bytes_a_second.unwrap_or_default();
                lines.sort_by(|one, other| bytes(other).total_cmp(&bytes(one)));
            }
            Sort::Name => {}
        }
        lines
    }

    /// Where the chosen line is.
    pub fn index(&self, lines: &[Line]) -> usize {
        let chosen = self.chosen.as_ref().and_then(|chosen| lines.iter().position(|line| line.name == *chosen));
        chosen.unwrap_or(0)
    }

    pub fn press(&mut self, input: Input) {
        let lines = self.lines();
        let index = self.index(&lines);
        let mut choose = |index: usize| self.chosen = lines.get(index).map(|line| line.name.clone());
        match input {
            Input::Up => choose(index.saturating_sub(1)),
            Input::Down => choose((index + 1).min(lines.len().saturating_sub(1))),
            Input::Top => choose(0),
            Input::Bottom => choose(lines.len().saturating_sub(1)),
            Input::Enter => {
                if let (Page::Services, Some(line)) = (&self.page, lines.get(index)) {
                    (self.page, self.chosen) = (Page::Service(line.name.clone()), None);
                }
            }
            Input::Back => match std::mem::take(&mut self.page) {
                Page::Services => self.quit = true,
                Page::Service(name) => self.chosen = Some(name),
            },
            Input::NextSort => self.sort = self.sort.next(self.counts_bytes()),
            Input::Sort(sort) => self.sort = sort,
            Input::Quit => self.quit = true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::top::rates::tests::flow;

    fn model() -> Model {
        let flows = [
            flow("default/web", "192.0.2.1:1", "10.1.0.1:80"),
            flow("default/web", "192.0.2.1:2", "10.1.0.2:80"),
            flow("default/web", "192.0.2.1:3", "10.1.0.2:80"),
            flow("default/api", "192.0.2.1:4", "10.1.0.3:80"),
        ];
        let services = ["default/api", "default/idle", "default/web"].map(|name| (name.to_owned(), (2, 0.0)));
        let mut model = Model::default();
        model.show(Picture {
            flows: flows.into_iter().map(|flow| (flow, false)).collect(),
            services: services.into(),
            ..Picture::default()
        });
        model
    }

    fn names(model: &Model) -> Vec<String> {
        model.lines().into_iter().map(|line| line.name).collect()
    }

    #[test]
    fn services_with_most_flows_come_first_and_idle_ones_are_there() {
        assert_eq!(names(&model()), ["default/web", "default/api", "default/idle"]);
    }

    #[test]
    fn keys_sort_and_move() {
        let mut model = model();
        model.press(Input::Sort(Sort::Name));
        assert_eq!(names(&model), ["default/api", "default/idle", "default/web"]);
        for input in [Input::Down, Input::Down, Input::Down, Input::Up] {
            model.press(input);
        }
        assert_eq!(model.chosen.as_deref(), Some("default/idle"));
    }

    #[test]
    fn the_chosen_line_stays_chosen_when_it_moves() {
        let mut model = model();
        model.press(Input::Down);
        model.press(Input::Sort(Sort::Name));
        assert_eq!(model.index(&model.lines()), 0);
        assert_eq!(model.chosen.as_deref(), Some("default/api"));
    }

    #[test]
    fn enter_goes_to_a_services_backends_and_back_returns_to_it() {
        let mut model = model();
        model.press(Input::Enter);
        assert_eq!(model.page, Page::Service("default/web".to_owned()));
        assert_eq!(names(&model), ["TCP 10.1.0.2:80", "TCP 10.1.0.1:80"]);
        model.press(Input::Back);
        assert_eq!((&model.page, model.chosen.as_deref(), model.quit), (&Page::Services, Some("default/web"), false));
        model.press(Input::Back);
        assert!(model.quit);
    }

    #[test]
    fn nothing_to_choose_from_is_no_trouble() {
        let mut model = Model::default();
        for input in [Input::Up, Input::Down, Input::Bottom, Input::Enter] {
            model.press(input);
        }
        assert_eq!((model.page, model.chosen), (Page::Services, None));
    }
}
