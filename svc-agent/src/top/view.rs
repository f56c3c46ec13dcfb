//! The model on a screen.
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Modifier, Style};
use ratatui::text::Line as TextLine;
use ratatui::widgets::{Row, Table, TableState};

use super::model::{Model, Page};
use super::rates::Traffic;
use crate::cli::print::escape;

const HELP: &str = "j/k move  Enter open  Esc back  sort: f flows  n new/s  a name  q quit";
const HELP_WITH_BYTES: &str = "j/k move  Enter open  Esc back  f flows  n new/s  b bytes/s  a name  q quit";

pub fn draw(frame: &mut Frame<'_>, model: &Model) {
    let in_service = matches!(model.page, Page::Service(_));
    let flows = if in_service { Constraint::Percentage(50) } else { Constraint::Length(0) };
    let [head, lines, below, help] =
        Layout::vertical([Constraint::Length(2), Constraint::Min(3), flows, Constraint::Length(1)]).areas(frame.area());
    frame.render_widget(TextLine::raw(heading(model)), head);
    let traffic = TextLine::raw(traffic(&model.picture.traffic));
    frame.render_widget(traffic, ratatui::layout::Rect { y: head.y + 1, height: 1, ..head });

    let rows = model.lines();
    // The last column is there where bytes are counted.
    let columns = if model.counts_bytes() { 6 } else { 5 };
    let header = if in_service {
        ["BACKEND", "", "FLOWS", "ESTABLISHED", "NEW/S", "BYTES/S"]
    } else {
        ["SERVICE", "BACKENDS", "FLOWS", "ESTABLISHED", "NEW/S", "BYTES/S"]
    };
    let table = rows.iter().map(|line| {
        let cells = [
            escape(&line.name),
            line.backends.map_or_else(String::new, |backends| backends.to_string()),
            line.load.flows.to_string(),
            line.load.established.to_string(),
            format!("{:.1}", line.load.new_a_second),
            line.load.bytes_a_second.map_or_else(String::new, size),
        ];
        Row::new(cells.into_iter().take(columns))
    });
    let widths = [
        Constraint::Fill(1),
        Constraint::Length(8),
        Constraint::Length(8),
        Constraint::Length(11),
        Constraint::Length(9),
        Constraint::Length(9),
    ];
    let table = Table::new(table, &widths[..columns])
        .header(Row::new(header.into_iter().take(columns)).style(Style::new().add_modifier(Modifier::BOLD)))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    let mut state = TableState::new().with_selected((!rows.is_empty()).then(|| model.index(&rows)));
    frame.render_stateful_widget(table, lines, &mut state);

    if let Page::Service(service) = &model.page {
        let of_service = model.picture.flows.iter().filter(|(flow, _)| flow.service.as_ref() == Some(service));
        let rows = of_service.take(usize::from(below.height)).map(|(flow, _)| {
            let idle = format!("{}s", flow.idle_seconds);
            Row::new([flow.client.clone(), flow.backend.clone(), flow.state.to_owned(), idle].map(|cell| escape(&cell)))
        });
        let widths = [Constraint::Fill(1), Constraint::Fill(1), Constraint::Length(11), Constraint::Length(9)];
        let header = Row::new(["CLIENT", "BACKEND", "STATE", "IDLE"]);
        let flows = Table::new(rows, widths).header(header.style(Style::new().add_modifier(Modifier::BOLD)));
        frame.render_widget(flows, below);
    }
    frame.render_widget(TextLine::raw(if model.counts_bytes() { HELP_WITH_BYTES } else { HELP }), help);
}

fn heading(model: &Model) -> String {
    let what = match &model.page {
        Page::Services => format!("{} services", model.picture.services.len()),
        Page::Service(name) => escape(name),
    };
    format!("svc-agent top: {what}, {} flows, by {}", model.picture.flows.len(), model.sort.label())
}

fn traffic(traffic: &Traffic) -> String {
    let Traffic { packets, bytes, sockets, refused } = *traffic;
    format!("translated {packets:.0} packets/s {}/s, sockets {sockets:.1}/s, refused {refused:.1}/s", size(bytes))
}

/// With one decimal from a thousand on.
fn size(bytes: f64) -> String {
    const UNITS: [&str; 5] = ["B", "KB", "MB", "GB", "TB"];
    let (mut value, mut unit) = (bytes, 0);
    while value >= 1000.0 && unit < UNITS.len() - 1 {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{value:.0} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::top::model::Input;
    use crate::top::rates::{Picture, tests::flow};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use rstest::rstest;

    #[rstest]
    #[case(0.0, "0 B")]
    #[case(999.0, "999 B")]
    #[case(1_000.0, "1.0 KB")]
    #[case(2_345_678.0, "2.3 MB")]
    #[case(9e15, "9000.0 TB")]
    fn sizes_are_short(#[case] bytes: f64, #[case] text: &str) {
        assert_eq!(size(bytes), text);
    }

    fn screen(model: &Model) -> String {
        let mut terminal = Terminal::new(TestBackend::new(76, 10)).unwrap();
        terminal.draw(|frame| draw(frame, model)).unwrap();
        let text = terminal.backend().to_string();
        text.lines().map(|line| line.trim_matches('"').trim_end().to_owned() + "\n").collect()
    }

    fn model() -> Model {
        let mut model = Model::default();
        model.show(Picture {
            flows: vec![
                (flow("default/web", "192.0.2.1:1", "10.1.0.1:80"), false),
                (flow("default/web", "192.0.2.1:2", "10.1.0.2:80"), true),
            ],
            services: [("default/web".to_owned(), (2, 3.5)), ("evil/\u{1b}[2J".to_owned(), (0, 0.0))].into(),
            traffic: Traffic { packets: 1234.4, bytes: 5_600_000.0, sockets: 2.0, refused: 0.5 },
            elapsed: Some(std::time::Duration::from_secs(2)),
            ..Picture::default()
        });
        model
    }

    #[test]
    fn bytes_are_a_column_where_they_are_counted() {
        let mut model = model();
        let carried = |backend: &str, rate: f64| (("default/web".to_owned(), backend.to_owned()), rate);
        model.picture.carried =
            Some([carried("TCP 10.1.0.1:80", 1_500.0), carried("TCP 10.1.0.2:80", 2_000_000.0)].into());
        insta::assert_snapshot!(screen(&model), @r"
        svc-agent top: 2 services, 2 flows, by flows
        translated 1234 packets/s 5.6 MB/s, sockets 2.0/s, refused 0.5/s
        SERVICE                    BACKENDS FLOWS    ESTABLISHED NEW/S     BYTES/S
        default/web                2        2        2           3.5       2.0 MB
        evil/\u001b[2J             0        0        0           0.0       0 B




        j/k move  Enter open  Esc back  f flows  n new/s  b bytes/s  a name  q quit
        ");
        model.press(Input::Enter);
        model.press(Input::Sort(crate::top::model::Sort::Bytes));
        insta::assert_snapshot!(screen(&model), @"
        svc-agent top: default/web, 2 flows, by bytes/s
        translated 1234 packets/s 5.6 MB/s, sockets 2.0/s, refused 0.5/s
        BACKEND                             FLOWS    ESTABLISHED NEW/S     BYTES/S
        TCP 10.1.0.2:80                     1        1           0.5       2.0 MB
        TCP 10.1.0.1:80                     1        1           0.0       1.5 KB
        CLIENT                      BACKEND                    STATE       IDLE
        192.0.2.1:1                 10.1.0.1:80                established 1s
        192.0.2.1:2                 10.1.0.2:80                established 1s

        j/k move  Enter open  Esc back  f flows  n new/s  b bytes/s  a name  q quit
        ");
    }

    #[test]
    fn services_are_lines_and_hostile_names_are_shown_harmless() {
        insta::assert_snapshot!(screen(&model()), @r"
        svc-agent top: 2 services, 2 flows, by flows
        translated 1234 packets/s 5.6 MB/s, sockets 2.0/s, refused 0.5/s
        SERVICE                              BACKENDS FLOWS    ESTABLISHED NEW/S
        default/web                          2        2        2           3.5
        evil/\u001b[2J                       0        0        0           0.0




        j/k move  Enter open  Esc back  sort: f flows  n new/s  a name  q quit
        ");
    }

    #[test]
    fn a_service_is_shown_with_its_backends_and_flows() {
        let mut model = model();
        model.press(Input::Enter);
        insta::assert_snapshot!(screen(&model), @"
        svc-agent top: default/web, 2 flows, by flows
        translated 1234 packets/s 5.6 MB/s, sockets 2.0/s, refused 0.5/s
        BACKEND                                       FLOWS    ESTABLISHED NEW/S
        TCP 10.1.0.1:80                               1        1           0.0
        TCP 10.1.0.2:80                               1        1           0.5
        CLIENT                      BACKEND                    STATE       IDLE
        192.0.2.1:1                 10.1.0.1:80                established 1s
        192.0.2.1:2                 10.1.0.2:80                established 1s

        j/k move  Enter open  Esc back  sort: f flows  n new/s  a name  q quit
        ");
    }

    #[test]
    fn a_screen_that_is_too_small_is_no_trouble() {
        let mut model = model();
        model.press(Input::Enter);
        let mut terminal = Terminal::new(TestBackend::new(3, 1)).unwrap();
        terminal.draw(|frame| draw(frame, &model)).unwrap();
    }
}
