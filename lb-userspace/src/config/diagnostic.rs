//! What is wrong with a configuration file, where, and what would be right.

use std::cell::RefCell;
use std::fmt::{self, Display};
use std::net::IpAddr;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet};

use super::model::CertificateFiles;

/// How much a [`Diagnostic`] weighs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// The file cannot be used.
    Error,
    /// The file can be used, but probably does not say what was meant.
    Warning,
}

/// One finding about a configuration file.
///
/// Its [`Display`] is a line `FILE:LINE:COLUMN: error: MESSAGE`, the source line with the value
/// underlined, and what would be right; without colours and without a newline at the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    /// Whether the file can be used all the same.
    pub severity: Severity,
    /// Name of the file, as it was given.
    pub file: Arc<str>,
    /// Line of the value, from 1.
    pub line: usize,
    /// Column of the value's first character, in characters, from 1.
    pub column: usize,
    /// The offending text as the file has it, shortened if it is long.
    pub value: String,
    /// What is wrong.
    pub message: String,
    /// What would be right.
    pub help: String,
    /// The line the value stands in (or begins in), or what is around the value if it is long.
    source_line: String,
    /// Where in `source_line` the value is, in bytes.
    underline: Range<usize>,
}

impl Diagnostic {
    /// Another finding at the same place.
    pub(super) fn with(&self, severity: Severity, message: String, help: String) -> Self {
        let (message, help) = (printable(&message), printable(&help));
        Self { severity, message, help, ..self.clone() }
    }
}

impl Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, level) = match self.severity {
            Severity::Error => ("error", Level::ERROR),
            Severity::Warning => ("warning", Level::WARNING),
        };
        let snippet = Snippet::source(self.source_line.as_str())
            .line_start(self.line)
            .annotation(AnnotationKind::Primary.span(self.underline.clone()));
        let excerpt = Group::with_level(level)
            .element(snippet)
            .element(Level::HELP.message(self.help.as_str()));
        let Self { file, line, column, message, .. } = self;
        writeln!(f, "{file}:{line}:{column}: {name}: {message}")?;
        f.write_str(&printable(&Renderer::plain().render(&[excerpt])))
    }
}

/// Every error of a configuration file, in the file's order; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors(Vec<Diagnostic>);

impl ConfigErrors {
    /// The errors among the findings, if there are some.
    pub fn among(findings: &[Diagnostic]) -> Option<Self> {
        let errors = findings.iter().filter(|finding| finding.severity == Severity::Error);
        let errors: Vec<Diagnostic> = errors.cloned().collect();
        (!errors.is_empty()).then_some(Self(errors))
    }

    /// The errors, in the file's order.
    pub fn diagnostics(&self) -> &[Diagnostic] {
        &self.0
    }
}

impl Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, diagnostic) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n\n")?;
            }
            Display::fmt(diagnostic, f)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// A range of bytes of the file.
pub(super) type Span = Range<usize>;

/// Collects what is found while a file is read. Shared by everything that reads it.
pub(super) struct Report<'a> {
    file: Arc<str>,
    text: &'a str,
    /// Where each line begins, in bytes; lookups must not cost a walk over a large file.
    line_starts: Vec<usize>,
    found: RefCell<Vec<(Span, Diagnostic)>>,
    unless_local: RefCell<Vec<(IpAddr, Diagnostic)>>,
    certificates: RefCell<Vec<(CertificateFiles, Diagnostic)>>,
    logs: RefCell<Vec<(PathBuf, Diagnostic)>>,
}

impl<'a> Report<'a> {
    pub(super) fn new(file_name: &str, text: &'a str) -> Self {
        let line_starts =
            std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        Self {
            file: file_name.into(),
            text,
            line_starts,
            found: RefCell::default(),
            unless_local: RefCell::default(),
            certificates: RefCell::default(),
            logs: RefCell::default(),
        }
    }

    /// Notes an error at `span`: what is wrong, and what would be right.
    pub(super) fn error(&self, span: Span, message: impl Into<String>, help: impl Into<String>) {
        self.note(Severity::Error, span, message.into(), help.into());
    }

    /// Notes a warning, as [`Self::error`] does an error.
    pub(super) fn warning(&self, span: Span, message: impl Into<String>, help: impl Into<String>) {
        self.note(Severity::Warning, span, message.into(), help.into());
    }

    /// Notes a warning that holds on a machine without this address.
    pub(super) fn warning_unless_local(
        &self,
        span: Span,
        address: IpAddr,
        message: String,
        help: &str,
    ) {
        let warning = self.diagnostic(Severity::Warning, &span, message, help.to_owned());
        self.unless_local.borrow_mut().push((address, warning));
    }

    /// Those warnings.
    pub(super) fn take_unless_local(&self) -> Vec<(IpAddr, Diagnostic)> {
        self.unless_local.take()
    }

    /// Notes where the file names a certificate.
    pub(super) fn certificate(&self, span: &Span, files: CertificateFiles) {
        let place = self.diagnostic(Severity::Warning, span, String::new(), String::new());
        self.certificates.borrow_mut().push((files, place));
    }

    /// Notes where the file names a log.
    pub(super) fn log(&self, span: &Span, path: PathBuf) {
        let place = self.diagnostic(Severity::Warning, span, String::new(), String::new());
        self.logs.borrow_mut().push((path, place));
    }

    /// Those logs.
    pub(super) fn take_logs(&self) -> Vec<(PathBuf, Diagnostic)> {
        self.logs.take()
    }

    /// Those certificates.
    pub(super) fn take_certificates(&self) -> Vec<(CertificateFiles, Diagnostic)> {
        self.certificates.take()
    }

    /// The text at `span` as it can stand in a message: one line, not long.
    pub(super) fn quote(&self, span: &Span) -> String {
        const MAX_CHARACTERS: usize = 60;
        let text = self.text.get(span.clone()).unwrap_or_default();
        let line = text.lines().next().unwrap_or_default();
        let mut quoted: String = line.chars().take(MAX_CHARACTERS).collect();
        if line.chars().nth(MAX_CHARACTERS).is_some() || line.len() < text.trim_end().len() {
            quoted.push('…');
        }
        quoted
    }

    /// `FILE:LINE` of `span`'s beginning, to point from one place to another.
    pub(super) fn line_of(&self, span: &Span) -> usize {
        self.line_starts.partition_point(|&start| start <= span.start)
    }

    /// Ends the collection: the warnings, or every error.
    pub(super) fn finish(self) -> Result<Vec<Diagnostic>, ConfigErrors> {
        let mut found = self.found.into_inner();
        found.sort_by_key(|(span, _)| span.start);
        let (errors, warnings): (Vec<_>, Vec<_>) = found
            .into_iter()
            .map(|(_, diagnostic)| diagnostic)
            .partition(|diagnostic| diagnostic.severity == Severity::Error);
        if errors.is_empty() { Ok(warnings) } else { Err(ConfigErrors(errors)) }
    }

    fn note(&self, severity: Severity, span: Span, message: String, help: String) {
        let diagnostic = self.diagnostic(severity, &span, message, help);
        self.found.borrow_mut().push((span, diagnostic));
    }

    fn diagnostic(
        &self,
        severity: Severity,
        span: &Span,
        message: String,
        help: String,
    ) -> Diagnostic {
        let line = self.line_of(span);
        let start = self.line_starts[line - 1];
        let end = self.line_starts.get(line).copied().unwrap_or(self.text.len());
        let source_line = self.text[start..end].trim_end_matches(['\r', '\n']);
        let begin = (span.start - start).min(source_line.len());
        let underline = begin..(span.end - start).clamp(begin, source_line.len());
        let column = source_line.get(..begin).unwrap_or_default().chars().count() + 1;
        let (source_line, underline) = around(source_line, underline);
        Diagnostic {
            severity,
            file: Arc::clone(&self.file),
            line,
            column,
            value: printable(&self.quote(span)),
            message: printable(&message),
            help: printable(&help),
            source_line,
            underline,
        }
    }
}

/// The part of a line that is worth showing: thousands of errors in one long line must not each
/// keep all of it.
fn around(line: &str, underline: Range<usize>) -> (String, Range<usize>) {
    const CONTEXT: usize = 200;
    let begin = line.floor_char_boundary(underline.start.saturating_sub(CONTEXT));
    let end = line.ceil_char_boundary(underline.end.min(underline.start + CONTEXT) + CONTEXT);
    let shown = line[begin..end].to_owned();
    let last = shown.len();
    (shown, underline.start - begin..(underline.end - begin).min(last))
}

/// Takes control characters out: a file must not steer the terminal that shows what is wrong in it.
fn printable(text: &str) -> String {
    text.replace(|c: char| c.is_control() && c != '\n', "\u{fffd}")
}
