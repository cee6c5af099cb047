//! What a person sees while the benchmark works: a bar on a terminal, nothing elsewhere.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, stderr};

/// Who is told how far a suite is.
pub trait Progress {
    /// A suite begins that takes this many steps.
    fn begin(&mut self, title: &str, steps: u64);
    /// The next step begins, which is this.
    fn step(&mut self, what: &str);
    /// Something worth a line that stays, such as a side that failed.
    fn note(&mut self, line: &str);
    /// The suite has ended.
    fn end(&mut self);
}

/// A bar on standard error, if that and standard output are terminals.
pub struct Bar {
    bar: ProgressBar,
    begun: bool,
    shown: bool,
}

impl Default for Bar {
    fn default() -> Self {
        let shown = stderr().is_terminal() && std::io::stdout().is_terminal();
        Self { bar: ProgressBar::hidden(), begun: false, shown }
    }
}

impl Progress for Bar {
    fn begin(&mut self, title: &str, steps: u64) {
        let target = if self.shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let style =
            ProgressStyle::with_template("{prefix} [{bar:24}] {pos}/{len} {elapsed_precise}, {eta} to go  {msg}");
        self.bar = ProgressBar::with_draw_target(Some(steps), target);
        self.bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
        self.bar.set_prefix(title.to_owned());
        self.begun = false;
    }

    fn step(&mut self, what: &str) {
        // A step is counted when the next one begins.
        if self.begun {
            self.bar.inc(1);
        }
        self.begun = true;
        self.bar.set_message(what.to_owned());
        self.bar.tick();
    }

    fn note(&mut self, line: &str) {
        if self.shown {
            self.bar.println(line);
        } else {
            eprintln!("{line}");
        }
    }

    fn end(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Tells nobody.
pub struct Silent;

impl Progress for Silent {
    fn begin(&mut self, _: &str, _: u64) {}
    fn step(&mut self, _: &str) {}
    fn note(&mut self, _: &str) {}
    fn end(&mut self) {}
}
