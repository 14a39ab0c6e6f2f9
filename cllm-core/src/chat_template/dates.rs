//! Python's `strftime` for the date of a rendering.

use jiff::civil::{Date, DateTime, Time};
use jiff::fmt::strtime;

/// What `datetime.strftime` prints in the C locale at midnight of a date, without a time zone.
/// Directives that it does not know stay as they are.
pub(super) fn strftime(format: &str, date: Date) -> String {
    let moment = date.to_datetime(Time::midnight());
    let mut out = String::new();
    let mut rest = format;
    while let Some(start) = rest.find('%') {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
        let flags = rest[1..].find(|character| !"-_0^#".contains(character)).unwrap_or(rest.len() - 1);
        let length = rest[1 + flags..].chars().next().map_or(rest.len(), |name| 1 + flags + name.len_utf8());
        out.push_str(&directive(&rest[..length], moment));
        rest = &rest[length..];
    }
    out + rest
}

fn directive(text: &str, moment: DateTime) -> String {
    match text {
        "%Z" | "%z" => String::new(),
        "%f" => "000000".to_owned(),
        "%c" => strftime("%a %b %e %H:%M:%S %Y", moment.date()),
        "%x" => strftime("%m/%d/%y", moment.date()),
        "%X" => "00:00:00".to_owned(),
        "%s" => {
            let days = (moment.date() - Date::new(1970, 1, 1).unwrap_or(moment.date())).get_days();
            (i64::from(days) * 86400).to_string()
        }
        _ => strtime::format(text, moment).unwrap_or_else(|_| text.to_owned()),
    }
}
