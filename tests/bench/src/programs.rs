//! Real programs from Debian packages, each with fixed work: interpreters, compressors, ciphers, a database, a compiler.
//!
//! The programs lie unpacked below a folder that has the same contents on every side; they are started through the
//! dynamic loader of that folder with its libraries, so the host's own are never used. Scripts are part of this binary,
//! inputs are made here from fixed pseudo-random numbers. A run is timed from fork to wait and writes to a file in
//! memory, whose checksum is taken afterwards; of three runs the median counts.

use crate::report::{self, Choice, Numbers};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Runs per row.
const REPETITIONS: usize = 3;

/// A row: its name and what prepares its inputs and gives its command.
struct Row(&'static str, fn(&Place) -> io::Result<Job>);

const ROWS: &[Row] = &[
    Row("perl", |place| {
        let script = place.file("words.pl", || include_bytes!("../programs/words.pl").to_vec())?;
        let text = place.file("text-small", || text(place.choice.amount(400_000)))?;
        Ok(place.program("usr/bin/perl").arg(&script).arg(&text))
    }),
    Row("python", |place| {
        let script = place.file("mixed.py", || include_bytes!("../programs/mixed.py").to_vec())?;
        let text = place.file("text-small", || text(place.choice.amount(400_000)))?;
        Ok(place.program("usr/bin/python3.11").args(&["-S", "-s", "-B"]).arg(&script).arg(&text))
    }),
    Row("xz", |place| {
        let text = place.file("text-small", || text(place.choice.amount(400_000)))?;
        Ok(place.program("usr/bin/xz").args(&["-6", "-T1", "-c"]).arg(&text))
    }),
    Row("gzip", |place| {
        let text = place.file("text", || text(place.choice.amount(4_000_000)))?;
        Ok(place.program("bin/gzip").args(&["-6", "-n", "-c"]).arg(&text))
    }),
    Row("zstd", |place| {
        let text = place.file("text", || text(place.choice.amount(4_000_000)))?;
        Ok(place.program("usr/bin/zstd").args(&["-9", "--single-thread", "-q", "-c"]).arg(&text))
    }),
    Row("openssl-sha256", |place| {
        let data = place.file("data", || data(place.choice.amount(64 << 20)))?;
        // Relative, because the output names the files.
        let name = data.file_name().unwrap_or_default().as_ref();
        Ok(place.program("usr/bin/openssl").args(&["dgst", "-sha256"]).arg(name).arg(name).arg(name).arg(name))
    }),
    Row("openssl-aes", |place| {
        let data = place.file("data", || data(place.choice.amount(64 << 20)))?;
        let key = "00112233445566778899aabbccddeeff0123456789abcdeffedcba9876543210";
        let start = "0f1e2d3c4b5a69788796a5b4c3d2e1f0";
        Ok(place.program("usr/bin/openssl").args(&["enc", "-aes-256-cbc", "-K", key, "-iv", start, "-in"]).arg(&data))
    }),
    Row("sqlite", |place| {
        let script = place.file("orders.sql", || include_bytes!("../programs/orders.sql").to_vec())?;
        Ok(place.program("usr/bin/sqlite3").args(&["-batch", ":memory:"]).input(script))
    }),
    Row("cc1", |place| {
        let source = place.file("compile.i", || source(place.choice.amount(3)))?;
        let name = source.file_name().unwrap_or_default().as_ref();
        let options = ["-quiet", "-O2", "-march=x86-64", "-mtune=generic", "-o", "-", "-fpreprocessed"];
        Ok(place.program("usr/lib/gcc/x86_64-linux-gnu/12/cc1").args(&options).arg(name))
    }),
    Row("busybox-sh", |place| {
        let script = place.file("loop.sh", || include_bytes!("../programs/loop.sh").to_vec())?;
        let count = place.choice.amount(40_000).to_string();
        Ok(place.static_program("bin/busybox").args(&["sh"]).arg(&script).args(&[&count]))
    }),
];

/// The names of all rows.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    ROWS.iter().map(|row| row.0)
}

/// Runs the chosen rows with the programs below `root` and files below `folder`, and prints a line for each.
///
/// # Errors
/// A file cannot be written, or a program fails; the sentence names the row.
pub(crate) fn run(choice: &Choice, root: &Path, folder: &Path) -> io::Result<()> {
    let place = Place::new(choice, root, folder)?;
    for Row(name, prepare) in ROWS {
        if choice.takes(name) {
            let (time, checksum) = prepare(&place)
                .and_then(|mut job| job.measure())
                .map_err(|error| io::Error::other(format!("{name} failed: {error}")))?;
            report::row(name, report::nanoseconds(time), checksum)?;
        }
    }
    Ok(())
}

/// Times any command as a row is timed, with its output in a file below `folder`.
///
/// # Errors
/// The command fails.
pub(crate) fn run_one(name: &str, words: &[String], folder: &Path) -> io::Result<()> {
    let (program, arguments) = words.split_first().ok_or_else(|| io::Error::other("there is no command to run"))?;
    let place = Place::new(&Choice::default(), Path::new("/"), folder)?;
    let mut command = Command::new(program);
    command.args(arguments);
    let mut job = Job { command, input: None, folder: place.folder.clone() };
    let (time, checksum) = job.measure()?;
    report::row(name, report::nanoseconds(time), checksum)
}

/// Where the programs are and where inputs and outputs go; the latter is removed at the end.
struct Place {
    choice: Choice,
    root: PathBuf,
    folder: PathBuf,
}

impl Place {
    fn new(choice: &Choice, root: &Path, folder: &Path) -> io::Result<Self> {
        let folder = folder.join(format!("bench-programs-{}", std::process::id()));
        fs::create_dir_all(&folder)
            .map_err(|error| io::Error::other(format!("cannot create {}: {error}", folder.display())))?;
        // Programs run in the folder of their files, where a relative path would mean something else.
        Ok(Self { choice: choice.clone(), root: fs::canonicalize(root)?, folder: fs::canonicalize(&folder)? })
    }

    /// An input, made when it is first asked for.
    fn file(&self, name: &str, contents: impl FnOnce() -> Vec<u8>) -> io::Result<PathBuf> {
        let path = self.folder.join(name);
        if !path.exists() {
            fs::write(&path, contents())?;
        }
        Ok(path)
    }

    /// A dynamic program below the root, started by the root's loader.
    fn program(&self, path: &str) -> Job {
        let libraries = self.root.join("lib/x86_64-linux-gnu");
        let more = self.root.join("usr/lib/x86_64-linux-gnu");
        let mut job = self.static_program("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2");
        let list = format!("{}:{}", libraries.display(), more.display());
        // The cache names libraries of the machine, which may be better matches by their version.
        job.command.args(["--inhibit-cache", "--library-path", &list]).arg(self.root.join(path));
        job
    }

    /// A static program below the root. The environment is the same for all: no locale, no random hashing, modules and
    /// configuration from the root or from nowhere.
    fn static_program(&self, path: &str) -> Job {
        let mut command = Command::new(self.root.join(path));
        command.current_dir(&self.folder).env_clear();
        command.env("LC_ALL", "C").env("PATH", "/nowhere").env("HOME", "/nowhere");
        command.env("PERL_HASH_SEED", "0").env("PERL5LIB", self.root.join("usr/lib/x86_64-linux-gnu/perl-base"));
        command.env("PYTHONHASHSEED", "0").env("PYTHONHOME", self.root.join("usr"));
        command.env("OPENSSL_CONF", "/dev/null");
        Job { command, input: None, folder: self.folder.clone() }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Nothing depends on it; what stays after a failure is a folder in /dev/shm or a guest's /tmp.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// A command that can be run again and again.
struct Job {
    command: Command,
    input: Option<PathBuf>,
    folder: PathBuf,
}

impl Job {
    fn arg(mut self, argument: &Path) -> Self {
        self.command.arg(argument);
        self
    }

    fn args(mut self, arguments: &[&str]) -> Self {
        self.command.args(arguments);
        self
    }

    /// Standard input from a file in place of nothing.
    fn input(mut self, file: PathBuf) -> Self {
        self.input = Some(file);
        self
    }

    /// The median time and the checksum of the output, which must be the same each time.
    fn measure(&mut self) -> io::Result<(Duration, u64)> {
        let (mut times, mut checksum) = (Vec::new(), None);
        for _ in 0..REPETITIONS {
            let (time, sum) = self.once()?;
            times.push(time);
            if *checksum.get_or_insert(sum) != sum {
                return Err(io::Error::other("repetitions wrote different output"));
            }
        }
        times.sort();
        Ok((times[REPETITIONS / 2], checksum.unwrap_or_default()))
    }

    fn once(&mut self) -> io::Result<(Duration, u64)> {
        let (output, errors) = (self.folder.join("output"), self.folder.join("errors"));
        let input = self.input.as_ref().map_or(Ok(Stdio::null()), |file| File::open(file).map(Stdio::from))?;
        self.command.stdin(input).stdout(File::create(&output)?).stderr(File::create(&errors)?);
        let start = Instant::now();
        let status = self.command.status()?;
        let time = start.elapsed();
        if !status.success() {
            let text = String::from_utf8_lossy(&fs::read(&errors)?).into_owned();
            let last = text.lines().last().unwrap_or("no message");
            return Err(io::Error::other(format!("{status}, {last}")));
        }
        let written = fs::read(&output)?;
        if written.is_empty() {
            return Err(io::Error::other("the program wrote nothing"));
        }
        Ok((time, report::of_bytes(&written)))
    }
}

/// About `length` bytes that resemble prose: words of skewed frequency, sentences, phrases that come back.
fn text(length: u64) -> Vec<u8> {
    const SYLLABLES: [&str; 24] = [
        "an", "be", "cor", "da", "e", "fin", "gra", "ho", "in", "ka", "lo", "men", "nu", "or", "pe", "qui", "ra", "st",
        "ta", "u", "ver", "wi", "tion", "s",
    ];
    let mut numbers = Numbers::new(11);
    let words: Vec<String> = (0..3000)
        .map(|rank| {
            let count = 1 + numbers.below(2 + u64::from(rank > 100) + u64::from(rank > 800));
            (0..count).map(|_| SYLLABLES[numbers.below(24) as usize]).collect()
        })
        .collect();
    let mut phrases: Vec<Vec<usize>> = Vec::new();
    let (mut text, mut column) = (Vec::new(), 0);
    while (text.len() as u64) < length {
        // A quarter of the phrases repeat an earlier one.
        let phrase = if !phrases.is_empty() && numbers.below(4) == 0 {
            phrases[numbers.below(phrases.len() as u64) as usize].clone()
        } else {
            let count = 3 + numbers.below(9);
            let new: Vec<_> = (0..count)
                .map(|_| {
                    let limit = 1 + numbers.below(words.len() as u64);
                    numbers.below(limit) as usize
                })
                .collect();
            if phrases.len() < 2000 {
                phrases.push(new.clone());
            }
            new
        };
        for (index, &word) in phrase.iter().enumerate() {
            let start = text.len();
            text.extend_from_slice(words[word].as_bytes());
            if index == 0 {
                text[start].make_ascii_uppercase();
            }
            column += text.len() - start + 1;
            text.push(if column > 90 { b'\n' } else { b' ' });
            column *= usize::from(column <= 90);
        }
        let last = text.len() - 1;
        text.insert(last, b".,;!?."[numbers.below(6) as usize]);
    }
    text
}

/// `length` bytes without pattern.
fn data(length: u64) -> Vec<u8> {
    let mut numbers = Numbers::new(12);
    (0..length / 8).flat_map(|_| numbers.next().to_le_bytes()).collect()
}

/// The compiler's input: `copies` of programs/compile.c under different names.
fn source(copies: u64) -> Vec<u8> {
    let text = include_str!("../programs/compile.c");
    (0..copies).map(|copy| text.replace('@', &copy.to_string())).collect::<String>().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_are_the_same_each_time_and_of_their_size() {
        let first = text(50_000);
        assert_eq!(first, text(50_000));
        assert!((50_000..50_200).contains(&first.len()), "{}", first.len());
        assert!(first.is_ascii() && first.split(|&byte| byte == b'\n').all(|line| line.len() < 120));
        assert_eq!(data(4096).len(), 4096);
        let source = String::from_utf8(source(3)).expect("C is ASCII");
        assert!(source.contains("machine_2(") && !source.contains('@'));
    }

    #[test]
    fn a_command_is_timed_and_its_output_checked() {
        let place = Place::new(&Choice::default(), Path::new("/"), &std::env::temp_dir()).expect("a folder");
        let folder = place.folder.clone();
        let input = place.file("input", || b"hello\n".to_vec()).expect("an input");
        let mut job = Job { command: Command::new("cat"), input: Some(input), folder: folder.clone() };
        let (time, checksum) = job.measure().expect("cat works");
        assert!(time > Duration::ZERO);
        assert_eq!(checksum, report::of_bytes(b"hello\n"));
        let mut bad = Job { command: Command::new("cat"), input: None, folder: folder.clone() };
        bad = bad.args(&["/nowhere/at/all"]);
        let error = bad.measure().expect_err("there is no such file").to_string();
        assert!(error.contains("/nowhere/at/all"), "{error}");
        let mut silent = Job { command: Command::new("cat"), input: None, folder: folder.clone() };
        assert!(silent.measure().is_err());
        drop(place);
        assert!(!folder.exists());
    }
}
