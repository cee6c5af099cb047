//! The control socket, `--control SOCKET`: a Unix socket at which a running machine takes commands, one JSON object a line, and answers each with
//! one line.
//!
//! | command | what happens |
//! |---|---|
//! | `{"command": "status"}` | says whether the machine is paused and, with a balloon, its target, its size as the guest says, and what went back to the host so far, in bytes |
//! | `{"command": "balloon", "size": "256M"}` | the guest is to give back so much memory in all; a number is in bytes |
//! | `{"command": "counters"}` | says what `run --stats` prints at the end, as far as it has come; the machine stands still for it, some hundred microseconds |
//! | `{"command": "pause"}` | all vCPUs stop at their next instruction; devices and clocks go on |
//! | `{"command": "resume"}` | they go on |
//! | `{"command": "stop"}` | ends the run as Ctrl-A x does, with status 0 |
//!
//! Answers are `{"ok": true, ...}` or `{"ok": false, "error": "a sentence"}`. The socket's file is its owner's alone (mode 0600) and goes when the
//! machine does. One connection is served at a time; others wait.

use crate::census::Census;
use crate::chipset::Chipset;
use crate::config::parse_size;
use serde_json::{Value, json};
use std::fs::{self, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use virtio::devices::balloon::BalloonControl;
use virtio::{Stop, Wake, Worker};

/// Longest line of a command.
const LONGEST: usize = 4096;
/// A client that does not take its answer for so long is hung up on.
const PATIENCE: Duration = Duration::from_secs(5);

/// What commands act on.
pub struct Reach {
    /// The machine.
    pub chipset: Arc<Chipset>,
    /// Its balloon, if it has one.
    pub balloon: Option<BalloonControl>,
    /// What its vCPUs count.
    pub census: Arc<Census>,
    /// Ends the run.
    pub stop: Box<dyn Fn() + Send>,
}

/// A socket that is being served; dropping it ends that and removes its file.
pub struct ControlSocket {
    path: PathBuf,
    _worker: Worker,
}

impl ControlSocket {
    /// Makes the socket and serves it.
    ///
    /// # Errors
    /// The path cannot be used, or something is there already.
    pub fn start(path: &Path, reach: Reach) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        let worker = Worker::start("control", move |stop| {
            let mut machine = Machine { reach, paused: false };
            while stop.wait(&[listener.as_fd()]) == Wake::Ready {
                if let Ok((stream, _)) = listener.accept() {
                    // Who hangs up in the middle of something harms nobody else.
                    let _ = converse(stream, stop, &mut machine);
                }
            }
            machine.resume();
        })?;
        Ok(Self { path: path.into(), _worker: worker })
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Serves one connection until its end.
fn converse(mut stream: UnixStream, stop: &Stop, machine: &mut Machine) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = Vec::new();
    let mut piece = [0; 1024];
    loop {
        if stop.wait(&[stream.as_fd()]) != Wake::Ready {
            return Ok(());
        }
        let n = stream.read(&mut piece)?;
        if n == 0 {
            return Ok(());
        }
        for &byte in &piece[..n] {
            if byte != b'\n' {
                line.push(byte);
                if line.len() > LONGEST {
                    return stream.write_all(b"{\"ok\":false,\"error\":\"a command has at most 4096 bytes\"}\n");
                }
                continue;
            }
            let answer = match machine.obey(&line) {
                Ok(answer) => answer,
                Err(error) => json!({ "ok": false, "error": error }),
            };
            stream.write_all(format!("{answer}\n").as_bytes())?;
            line.clear();
        }
    }
}

struct Machine {
    reach: Reach,
    paused: bool,
}

impl Machine {
    /// Carries out one command.
    fn obey(&mut self, line: &[u8]) -> Result<Value, String> {
        let command: Value = serde_json::from_slice(line).map_err(|e| format!("this is no JSON ({e})"))?;
        let done = Ok(json!({ "ok": true }));
        match command.get("command").and_then(Value::as_str) {
            Some("status") => Ok(self.status()),
            Some("balloon") => {
                let balloon =
                    self.reach.balloon.as_ref().ok_or("the machine has no balloon; start it with --balloon")?;
                let size = match command.get("size") {
                    Some(Value::String(text)) => parse_size(text).map_err(|e| e.to_string())?,
                    Some(Value::Number(n)) => n.as_u64().ok_or("a size is a whole number of bytes")?,
                    _ => return Err("\"size\" is missing; write \"size\": \"256M\"".into()),
                };
                balloon.set_target(size);
                done
            }
            Some("counters") => {
                let counters = self.reach.census.ask(&self.reach.chipset).ok_or("the machine is stopping")?;
                let counters: serde_json::Map<_, _> = counters.into_iter().map(|(name, n)| (name, n.into())).collect();
                Ok(json!({ "ok": true, "counters": counters }))
            }
            Some("pause") => {
                if !self.paused {
                    self.reach.chipset.pause();
                    self.paused = true;
                }
                done
            }
            Some("resume") => {
                self.resume();
                done
            }
            Some("stop") => {
                (self.reach.stop)();
                done
            }
            Some(other) => {
                Err(format!("\"{other}\" is no command; use status, balloon, counters, pause, resume or stop"))
            }
            None => Err("\"command\" is missing; use status, balloon, counters, pause, resume or stop".into()),
        }
    }

    fn resume(&mut self) {
        if std::mem::take(&mut self.paused) {
            self.reach.chipset.resume();
        }
    }

    fn status(&self) -> Value {
        let balloon = self
            .reach
            .balloon
            .as_ref()
            .map(|b| json!({ "target": b.target(), "actual": b.actual(), "returned": b.returned() }));
        json!({ "ok": true, "paused": self.paused, "balloon": balloon })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chipset::ChipsetConfig;
    use crate::devices::control::StopCause;
    use std::io::{BufRead, BufReader};
    use virtio::devices::balloon::Balloon;

    /// A machine without vCPUs behind a socket.
    fn served(name: &str, balloon: Option<&Balloon>) -> (Arc<Chipset>, ControlSocket, PathBuf) {
        let path = std::env::temp_dir().join(format!("paravane-control-{name}-{}", std::process::id()));
        let cfg = ChipsetConfig { cpus: 1, debug_exit: false, serial: Box::new(io::sink()), pv: None };
        let chipset = Chipset::new(cfg).unwrap();
        let theirs = chipset.clone();
        let reach = Reach {
            chipset: chipset.clone(),
            balloon: balloon.map(Balloon::control),
            census: Arc::new(Census::new(0)),
            stop: Box::new(move || theirs.stop(StopCause::Host)),
        };
        let socket = ControlSocket::start(&path, reach).unwrap();
        (chipset, socket, path)
    }

    fn ask(stream: &mut BufReader<UnixStream>, line: &str) -> Value {
        stream.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_line(&mut answer).unwrap();
        serde_json::from_str(&answer).unwrap()
    }

    #[test]
    fn commands_are_obeyed() {
        let balloon = Balloon::new(0, true, true);
        let (chipset, socket, path) = served("obeyed", Some(&balloon));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let mut s = BufReader::new(UnixStream::connect(&path).unwrap());
        assert_eq!(ask(&mut s, r#"{"command":"balloon","size":"64M"}"#), json!({"ok": true}));
        assert_eq!(balloon.control().target(), 64 << 20);
        assert_eq!(ask(&mut s, r#"{"command":"balloon","size":8192}"#), json!({"ok": true}));
        let status = ask(&mut s, r#"{"command":"status"}"#);
        assert_eq!(
            status,
            json!({"ok": true, "paused": false, "balloon": {"target": 8192, "actual": 0, "returned": 0}})
        );
        for _ in 0..2 {
            ask(&mut s, r#"{"command":"pause"}"#);
            assert!(chipset.paused());
        }
        assert_eq!(ask(&mut s, r#"{"command":"status"}"#)["paused"], true);
        ask(&mut s, r#"{"command":"resume"}"#);
        assert!(!chipset.paused());
        assert_eq!(ask(&mut s, r#"{"command":"counters"}"#), json!({"ok": true, "counters": {}}));
        ask(&mut s, r#"{"command":"pause"}"#);
        ask(&mut s, r#"{"command":"stop"}"#);
        assert_eq!(chipset.stop_cause(), Some(StopCause::Host));
        drop(socket);
        assert!(!path.exists() && !chipset.paused(), "nothing stays behind");
    }

    #[test]
    fn nonsense_is_answered_with_a_sentence() {
        let (_chipset, _socket, path) = served("nonsense", None);
        let mut s = BufReader::new(UnixStream::connect(&path).unwrap());
        for (line, part) in [
            ("hello", "no JSON"),
            ("{}", "is missing"),
            (r#"{"command":"fly"}"#, "no command"),
            (r#"{"command":"balloon","size":"1M"}"#, "no balloon"),
        ] {
            let answer = ask(&mut s, line);
            assert_eq!(answer["ok"], false);
            assert!(answer["error"].as_str().unwrap().contains(part), "{answer}");
        }
        // A second client waits for the first to end; a line without end is cut off.
        let mut second = BufReader::new(UnixStream::connect(&path).unwrap());
        drop(s);
        assert_eq!(ask(&mut second, r#"{"command":"status"}"#)["balloon"], Value::Null);
        let answer = ask(&mut second, &"x".repeat(LONGEST + 1));
        assert!(answer["error"].as_str().unwrap().contains("4096"));
        let third = served("nonsense-2", None);
        assert!(UnixListener::bind(&third.2).is_err(), "a path is used once");
    }
}
