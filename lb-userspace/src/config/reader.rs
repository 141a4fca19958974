//! Typed access to a TOML document that remembers where everything stands.
//!
//! Reading goes on after an error: whoever gets `None` here knows that the reason is noted in the
//! [`Report`] and goes on with the next key.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::diagnostic::{Report, Span};
use super::model::CertificateFiles;

/// A value that a string did not give: what is wrong with it, and what would be right.
pub(super) struct Wrong {
    pub(super) message: String,
    pub(super) help: String,
}

impl Wrong {
    pub(super) fn new(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { message: message.into(), help: help.into() }
    }
}

/// A value, where it stands, and the key that it belongs to.
#[derive(Clone, Copy)]
pub(super) struct Value<'a> {
    report: &'a Report<'a>,
    key: &'a str,
    /// Whether the key has a list, of which this is an element.
    in_list: bool,
    node: &'a Spanned<DeValue<'a>>,
}

impl<'a> Value<'a> {
    pub(super) fn span(&self) -> Span {
        self.node.span()
    }

    /// The key that the value, or the list it is in, belongs to.
    pub(super) fn key(&self) -> &'a str {
        self.key
    }

    /// The value as the file writes it.
    pub(super) fn quote(&self) -> String {
        self.report.quote(&self.span())
    }

    /// The line the value begins in.
    pub(super) fn line(&self) -> usize {
        self.report.line_of(&self.span())
    }

    pub(super) fn error(&self, message: impl Into<String>, help: impl Into<String>) {
        self.report.error(self.span(), message, help);
    }

    pub(super) fn warning(&self, message: impl Into<String>, help: impl Into<String>) {
        self.report.warning(self.span(), message, help);
    }

    /// See [`Report::warning_unless_local`].
    pub(super) fn warning_unless_local(&self, address: IpAddr, message: String, help: &str) {
        self.report.warning_unless_local(self.span(), address, message, help);
    }

    /// Notes that the value names a certificate.
    pub(super) fn is_certificate(&self, files: CertificateFiles) {
        self.report.certificate(&self.span(), files);
    }

    /// Notes that the value names a log.
    pub(super) fn is_log(&self, path: PathBuf) {
        self.report.log(&self.span(), path);
    }

    /// Whether the value is a string; other forms may be allowed in its place.
    pub(super) fn is_string(&self) -> bool {
        self.node.get_ref().is_str()
    }

    /// Whether the value is this string.
    pub(super) fn is(&self, text: &str) -> bool {
        self.node.get_ref().as_str() == Some(text)
    }

    /// Whether the value is a table; other forms may be allowed in its place.
    pub(super) fn is_table(&self) -> bool {
        self.node.get_ref().is_table()
    }

    pub(super) fn string(&self, help: &str) -> Option<&'a str> {
        self.node.get_ref().as_str().or_else(|| self.wrong_type("a string", help))
    }

    pub(super) fn boolean(&self) -> Option<bool> {
        let help = "write true or false, without quotes";
        self.node.get_ref().as_bool().or_else(|| self.wrong_type("true or false", help))
    }

    pub(super) fn integer(&self, range: RangeInclusive<u32>) -> Option<u32> {
        let (min, max) = (range.start(), range.end());
        let help = format!("write a number from {min} to {max}, without quotes");
        let Some(integer) = self.node.get_ref().as_integer() else {
            return self.wrong_type("an integer", &help);
        };
        // What does not even fit is out of every range.
        let number = u32::from_str_radix(integer.as_str(), integer.radix()).ok();
        let in_range = number.filter(|number| range.contains(number));
        if in_range.is_none() {
            self.refuse(format!("write a number from {min} to {max}"));
        }
        in_range
    }

    /// A port that something can listen on.
    pub(super) fn port(&self) -> Option<u16> {
        self.integer(1..=u16::MAX.into()).and_then(|port| u16::try_from(port).ok())
    }

    pub(super) fn duration(&self, range: RangeInclusive<Duration>) -> Option<Duration> {
        let (min, max) = (show_duration(*range.start()), show_duration(*range.end()));
        let help =
            format!("write a duration from {min} to {max} in quotes, such as \"10s\" or \"500ms\"");
        let duration = humantime::parse_duration(self.string(&help)?).ok();
        let in_range = duration.filter(|duration| range.contains(duration));
        if in_range.is_none() {
            self.refuse(help);
        }
        in_range
    }

    /// A duration without a fraction of a second.
    pub(super) fn whole_seconds(&self, range: RangeInclusive<Duration>) -> Option<Duration> {
        let duration = self.duration(range)?;
        if duration.subsec_nanos() != 0 {
            let whole = Duration::from_secs(duration.as_secs());
            self.refuse(format!("write whole seconds, such as \"{}\"", show_duration(whole)));
            return None;
        }
        Some(duration)
    }

    /// A number of bytes, or a text of one with its unit.
    pub(super) fn bytes(&self, range: RangeInclusive<u64>) -> Option<u64> {
        let (min, max) = (range.start(), range.end());
        let help = format!(
            "write bytes from {min} to {max}, as a number or with a unit in quotes, such as \"1MB\" \
             or \"512KiB\""
        );
        let value = self.node.get_ref();
        let bytes = match (value.as_integer(), value.as_str()) {
            (Some(integer), _) => u64::from_str_radix(integer.as_str(), integer.radix()).ok(),
            (None, Some(text)) => bytes_of(text),
            (None, None) => return self.wrong_type("an integer or a string", &help),
        };
        let in_range = bytes.filter(|bytes| range.contains(bytes));
        if in_range.is_none() {
            self.refuse(help);
        }
        in_range
    }

    /// One of `known`; the values in `later` are refused as not supported yet.
    pub(super) fn choice<T: Copy>(&self, known: &[(&str, T)], later: &[&str]) -> Option<T> {
        let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
        let quoted: Vec<String> = names.iter().map(|name| format!("\"{name}\"")).collect();
        let accepted = format!("write {}", enumerate(&quoted, "or"));
        let text = self.string(&accepted)?;
        let chosen = known.iter().find(|(name, _)| *name == text).map(|(_, value)| *value);
        if chosen.is_none() && later.contains(&text) {
            self.not_supported_yet(&accepted);
        } else if chosen.is_none() {
            self.refuse(did_you_mean(text, &names) + &accepted);
        }
        chosen
    }

    /// A string that `parse` understands.
    pub(super) fn parsed<T>(
        &self,
        help: &str,
        parse: impl FnOnce(&'a str) -> Result<T, Wrong>,
    ) -> Option<T> {
        match parse(self.string(help)?) {
            Ok(value) => Some(value),
            Err(wrong) => {
                self.error(wrong.message, wrong.help);
                None
            }
        }
    }

    /// The elements of a list.
    pub(super) fn items(&self, help: &str) -> Option<Vec<Value<'a>>> {
        let Some(array) = self.node.get_ref().as_array() else {
            return self.wrong_type("a list", help);
        };
        Some(array.iter().map(|node| Value { node, in_list: true, ..*self }).collect())
    }

    /// A table; `name` is how messages call it.
    pub(super) fn table(&self, name: impl Into<String>, help: &str) -> Option<Table<'a>> {
        let Some(table) = self.node.get_ref().as_table() else {
            return self.wrong_type("a table", help);
        };
        Some(Table::new(self.report, name.into(), self.span(), table))
    }

    /// Refuses a value of the right type.
    pub(super) fn refuse(&self, help: impl Into<String>) {
        self.error(self.refusal(), help);
    }

    /// That the value, though of the right type, is none that the key can have.
    pub(super) fn refusal(&self) -> String {
        let verb = if self.in_list { "contain" } else { "be" };
        format!("`{}` cannot {verb} {}", self.key, self.quote())
    }

    /// Refuses a value of a feature to come.
    pub(super) fn not_supported_yet(&self, help: &str) {
        self.error(format!("`{} = {}` is not supported yet", self.key, self.quote()), help);
    }

    fn wrong_type<T>(&self, expected: &str, help: &str) -> Option<T> {
        let subject = if self.in_list { "each of " } else { "" };
        let article = match self.node.get_ref().type_str() {
            kind @ ("integer" | "array") => format!("an {kind}"),
            kind => format!("a {kind}"),
        };
        self.error(
            format!(
                "{subject}`{}` must be {expected}, but {} is {article}",
                self.key,
                self.quote()
            ),
            help,
        );
        None
    }
}

/// A section such as `[target_group.web]`.
pub(super) struct Section<'a> {
    pub(super) name: &'a str,
    pub(super) table: Table<'a>,
}

/// A table whose keys are taken one after another; those left at the end are unknown.
pub(super) struct Table<'a> {
    report: &'a Report<'a>,
    /// How messages call it.
    name: String,
    /// What to point at when something is missing.
    span: Span,
    entries: BTreeMap<&'a str, (Span, Value<'a>)>,
    /// Keys that were asked for, so that an unknown one can be answered with them.
    accepted: Vec<&'static str>,
    /// Keys that are known, but have no meaning here.
    meaningless: Vec<&'static str>,
}

impl<'a> Table<'a> {
    /// The whole file.
    pub(super) fn root(report: &'a Report<'a>, table: &'a DeTable<'a>) -> Self {
        Self::new(report, "the file".to_owned(), 0..0, table)
    }

    fn new(report: &'a Report<'a>, name: String, span: Span, table: &'a DeTable<'a>) -> Self {
        let entries = table
            .iter()
            .map(|(key, node)| {
                let name: &str = key.get_ref();
                (name, (key.span(), Value { report, key: name, in_list: false, node }))
            })
            .collect();
        Self { report, name, span, entries, accepted: Vec::new(), meaningless: Vec::new() }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn error(&self, message: impl Into<String>, help: impl Into<String>) {
        self.report.error(self.span.clone(), message, help);
    }

    pub(super) fn warning(&self, message: impl Into<String>, help: impl Into<String>) {
        self.report.warning(self.span.clone(), message, help);
    }

    /// The value of `key`, if it is there.
    pub(super) fn optional(&mut self, key: &'static str) -> Option<Value<'a>> {
        self.accepted.push(key);
        self.entries.remove(key).map(|(_, value)| value)
    }

    /// The value of `key`, which must be there; `help` says what to write.
    pub(super) fn required(&mut self, key: &'static str, help: &str) -> Option<Value<'a>> {
        let value = self.optional(key);
        if value.is_none() {
            self.error(format!("{} has no `{key}`", self.name), help);
        }
        value
    }

    /// Refuses keys of features to come. They have no default that could be written.
    pub(super) fn not_supported_yet(&mut self, keys: &[&str]) {
        for key in keys {
            if let Some((span, _)) = self.entries.remove(*key) {
                let message = format!("`{key}` is not supported yet");
                self.report.error(span, message, format!("leave `{key}` out"));
            }
        }
    }

    /// Refuses keys that are others' in this place, such as "in an http listener".
    pub(super) fn meaningless(&mut self, keys: &[&'static str], place: &str, help: &str) {
        for key in keys {
            if let Some((span, _)) = self.entries.remove(*key) {
                self.report.error(span, format!("`{key}` has no meaning {place}"), help);
            }
        }
        self.meaningless.extend(keys);
    }

    /// Passes over keys of which nobody can say whether they belong here.
    pub(super) fn ignore(&mut self, keys: &[&str]) {
        for key in keys {
            self.entries.remove(*key);
        }
    }

    /// The sections `[key.NAME]`, in the file's order.
    pub(super) fn sections(&mut self, key: &'static str) -> Vec<Section<'a>> {
        let form = format!("write a section [{key}.NAME]");
        let Some(table) = self.optional(key).and_then(|value| value.table(key, &form)) else {
            return Vec::new();
        };
        let mut entries: Vec<_> = table.entries.into_iter().collect();
        entries.sort_by_key(|(_, (span, _))| span.start);
        let read = |(name, (span, value)): (&'a str, (Span, Value<'a>))| {
            self.check_name(name, &span);
            let table = value.table(format!("[{key}.{name}]"), &form)?;
            Some(Section { name, table: Table { span, ..table } })
        };
        entries.into_iter().filter_map(read).collect()
    }

    /// The table `[key]`, if it is there.
    pub(super) fn subtable(&mut self, key: &'static str, name: String) -> Option<Table<'a>> {
        self.accepted.push(key);
        let (span, value) = self.entries.remove(key)?;
        let help = format!("write a section {name}");
        let table = value.table(name, &help)?;
        Some(Table { span, ..table })
    }

    /// Refuses every key that nobody asked for.
    pub(super) fn finish(self) {
        let mut accepted = self.accepted;
        accepted.retain(|key| !self.meaningless.contains(key));
        let keys: Vec<String> = accepted.iter().map(|key| format!("`{key}`")).collect();
        let keys = enumerate(&keys, "and");
        for (key, (span, _)) in &self.entries {
            let help = did_you_mean(key, &accepted) + &format!("{} takes {keys}", self.name);
            self.report.error(span.clone(), format!("unknown key `{key}` in {}", self.name), help);
        }
    }

    /// Names turn up in commands, logs and `sg:NAME`; this keeps them unambiguous there.
    fn check_name(&self, name: &str, span: &Span) {
        const MAX_CHARACTERS: usize = 64;
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.len() > MAX_CHARACTERS || !name.chars().all(allowed) {
            self.report.error(
                span.clone(),
                format!("{} cannot be a name", self.report.quote(span)),
                "use 1 to 64 letters, digits, `-`, `_` and `.`",
            );
        }
    }
}

/// `a`, `a or b`, `a, b or c`.
pub(super) fn enumerate(names: &[String], conjunction: &str) -> String {
    match names {
        [] => String::new(),
        [only] => only.clone(),
        [rest @ .., last] => format!("{} {conjunction} {last}", rest.join(", ")),
    }
}

/// `did you mean NAME? ` for the name nearest to what was written, if one is near.
pub(super) fn did_you_mean(written: &str, names: &[&str]) -> String {
    const NEAR_ENOUGH: f64 = 0.6;
    let written = written.to_lowercase();
    let similarity = |name: &&&str| strsim::normalized_damerau_levenshtein(&written, name);
    let nearest = names
        .iter()
        .filter(|name| similarity(name) >= NEAR_ENOUGH)
        .max_by(|a, b| similarity(a).total_cmp(&similarity(b)));
    nearest.map(|name| format!("did you mean `{name}`? ")).unwrap_or_default()
}

/// Seconds where they are whole, else milliseconds: the forms the file is written in.
pub(super) fn show_duration(duration: Duration) -> String {
    if duration.subsec_nanos() == 0 {
        format!("{}s", duration.as_secs())
    } else {
        format!("{}ms", duration.as_millis())
    }
}

/// Bytes of a text such as `1MB`; powers of 1000, and of 1024 with an `i`.
fn bytes_of(text: &str) -> Option<u64> {
    const UNITS: [(&str, u64); 7] = [
        ("B", 1),
        ("KB", 1000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
    ];
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let (_, factor) = UNITS.iter().find(|(name, _)| *name == unit)?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

#[cfg(test)]
mod tests {
    use super::bytes_of;

    #[test]
    fn bytes_have_units() {
        assert_eq!(bytes_of("7B"), Some(7));
        assert_eq!(bytes_of("1MB"), Some(1_000_000));
        assert_eq!(bytes_of("3GiB"), Some(3 << 30));
        for wrong in ["", "1", "MB", "1mb", "1 MB", "-1MB", "1.5MB", "99999999999GB"] {
            assert_eq!(bytes_of(wrong), None, "{wrong}");
        }
    }
}
