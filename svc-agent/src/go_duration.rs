//! Durations as Go writes them, and as kube-proxy's flags and file have them: 30s, 1m30s, 500ms.
use std::time::Duration;

/// Go's own limit, 292 years: it counts nanoseconds in an i64.
const MOST: u64 = i64::MAX as u64;

/// As Go's time.ParseDuration reads it, but for what is negative.
///
/// # Errors
/// A sentence that says what is wrong with it.
pub fn parse(text: &str) -> Result<Duration, String> {
    const HINT: &str = "say it as 30s or 1m30s";
    if text.starts_with('-') {
        return Err(format!("{text:?} is negative"));
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    if rest.is_empty() {
        return Err(format!("{text:?} is no duration: {HINT}"));
    }
    let is_numeric = |character: char| character.is_ascii_digit() || character == '.';
    let mut total = 0;
    while !rest.is_empty() {
        let (number, tail) = rest.split_at(rest.find(|character| !is_numeric(character)).unwrap_or(rest.len()));
        let (unit, tail) = tail.split_at(tail.find(is_numeric).unwrap_or(tail.len()));
        rest = tail;
        let nanoseconds = match unit {
            "ns" => 1e0,
            "us" | "\u{b5}s" | "\u{3bc}s" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            "m" => 60e9,
            "h" => 3600e9,
            "" => return Err(format!("{text:?} has a number without a unit: {HINT}")),
            other => return Err(format!("{other:?} is no unit of time: {HINT}")),
        };
        let number: f64 = number.parse().map_err(|_| format!("{text:?} is no duration: {HINT}"))?;
        // A float that is too large becomes the largest integer.
        total = u64::saturating_add(total, (number * nanoseconds) as u64);
    }
    if total > MOST { Err(format!("{text:?} is longer than 292 years")) } else { Ok(Duration::from_nanos(total)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("0", 0)]
    #[case("0s", 0)]
    #[case("+5s", 5_000_000_000)]
    #[case("1m30s", 90_000_000_000)]
    #[case("500ms", 500_000_000)]
    #[case("1.5h", 5_400_000_000_000)]
    #[case(".5s", 500_000_000)]
    #[case("1us1\u{b5}s1\u{3bc}s1ns", 3_001)]
    #[case("2562047h47m", 9_223_372_020_000_000_000)]
    fn what_go_reads_is_read(#[case] text: &str, #[case] nanoseconds: u64) {
        assert_eq!(parse(text), Ok(Duration::from_nanos(nanoseconds)));
    }

    #[rstest]
    #[case::nothing("", "30s")]
    #[case::a_sign_alone("+", "30s")]
    #[case::negative("-5s", "negative")]
    #[case::negative_in_the_middle("5s-3s", "s-")]
    #[case::no_unit("5", "without a unit")]
    #[case::no_number("s", "no duration")]
    #[case::two_points("1.2.3s", "no duration")]
    #[case::unit("5 parsecs", "\" parsecs\" is no unit")]
    #[case::not_a_number("infs", "no unit")]
    #[case::too_long("2562048h", "292 years")]
    #[case::far_too_long("99999999999999999999999999h", "292 years")]
    #[case::too_long_together("2562047h2562047h2562047h", "292 years")]
    fn what_is_no_duration_is_told(#[case] text: &str, #[case] why: &str) {
        let error = parse(text).unwrap_err();
        assert!(error.contains(why), "{error}");
    }
}
