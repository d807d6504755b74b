//! Templates rendered in a process of their own.
//!
//! A template is a stranger's program, and nothing inside of a process bounds what it takes: a few steps make a list of lists that has 2^60
//! elements once somebody looks at them. So `carryon-worker` runs itself as `carryon-worker render`, which the kernel ends where it takes more
//! than its seconds or its bytes; the next prompt gets another one. They talk in lines of JSON: the templates, then a line a [`Job`] and a line
//! an answer. A program that has not called [`render_apart`], such as a test, renders where it is.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

use super::render::{Failure, Job, Renderer, Templates};

/// Seconds of a core for one prompt; a long one of a large template takes some milliseconds.
const SECONDS: u64 = 5;
/// Address space of the process, its program among it.
const MEMORY_BYTES: u64 = 1 << 30;
/// Longest answer, as JSON.
const MAX_ANSWER_BYTES: u64 = 1 << 26;

/// What is run with the argument `render`.
static PROGRAM: OnceLock<PathBuf> = OnceLock::new();

/// From here on this process has its chat templates rendered by `program render`, which is to call [`render_lines`].
pub fn render_apart(program: PathBuf) {
    // Whoever said so first is believed: it is this program either way.
    let _ = PROGRAM.set(program);
}

/// The other side of [`render_apart`]: renders what comes from the standard input until that ends.
pub fn render_lines() -> io::Result<()> {
    limit(Resource::As, MEMORY_BYTES)?;
    limit(Resource::Core, 0)?;
    let (mut input, mut output) = (BufReader::new(io::stdin()), io::stdout());
    let mut line = String::new();
    input.read_line(&mut line)?;
    let renderer = Renderer::new(&serde_json::from_str::<Templates>(&line)?).map_err(io::Error::other)?;
    loop {
        line.clear();
        if input.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let used = clock_gettime(ClockId::ProcessCPUTime).tv_sec;
        limit(Resource::Cpu, u64::try_from(used).unwrap_or(0) + 1 + SECONDS)?;
        let unread = |error: serde_json::Error| Failure { message: format!("it is given what cannot be read: {error}"), unknown: false };
        let answer = serde_json::from_str(&line).map_err(unread).and_then(|job| renderer.render(&job));
        output.write_all(format!("{}\n", serde_json::to_string(&answer)?).as_bytes())?;
        output.flush()?;
    }
}

/// Sets the limit that can be raised again.
fn limit(resource: Resource, value: u64) -> io::Result<()> {
    let maximum = getrlimit(resource).maximum;
    Ok(setrlimit(resource, Rlimit { current: Some(maximum.map_or(value, |maximum| maximum.min(value))), maximum })?)
}

/// The process that renders a model's templates, started when there is something to render.
pub(super) struct Apart {
    program: &'static PathBuf,
    templates: Templates,
    running: Mutex<Option<Running>>,
}

/// It, and the pipes to and from it.
struct Running {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Apart {
    /// `None` where templates are rendered in this process.
    pub(super) fn new(templates: &Templates) -> Option<Self> {
        Some(Self { program: PROGRAM.get()?, templates: templates.clone(), running: Mutex::new(None) })
    }

    /// The text, or why there is none. One prompt after the other: each takes a fraction of a millisecond.
    pub(super) fn render(&self, job: &Job) -> Result<String, Failure> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = |message: String| Failure { message, unknown: false };
        // It may have been ended while nobody asked.
        let alive = running.take().and_then(Running::alive);
        let started = alive.map_or_else(|| Running::start(self.program, &self.templates), Ok);
        let mut asked = started.map_err(|error| failed(format!("{:?} cannot be started to render it: {error}", self.program)))?;
        match asked.ask(job) {
            Ok(answer) => {
                *running = Some(asked);
                answer
            }
            Err(error) => Err(failed(asked.end(&error))),
        }
    }
}

impl Running {
    fn start(program: &PathBuf, templates: &Templates) -> io::Result<Self> {
        let mut command = Command::new(program);
        let mut child = command.arg("render").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else { return Err(io::ErrorKind::BrokenPipe.into()) };
        let mut running = Self { child, input, output: BufReader::new(output) };
        running.send(templates)?;
        Ok(running)
    }

    fn alive(mut self) -> Option<Self> {
        matches!(self.child.try_wait(), Ok(None)).then_some(self)
    }

    fn ask(&mut self, job: &Job) -> io::Result<Result<String, Failure>> {
        self.send(job)?;
        let mut line = Vec::new();
        (&mut self.output).take(MAX_ANSWER_BYTES).read_until(b'\n', &mut line)?;
        match line.is_empty() {
            true => Err(io::ErrorKind::UnexpectedEof.into()),
            false => Ok(serde_json::from_slice(&line)?),
        }
    }

    fn send(&mut self, line: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(line)?;
        line.push(b'\n');
        self.input.write_all(&line)
    }

    /// Ends it, and says why that was necessary.
    fn end(mut self, error: &io::Error) -> String {
        // One that has come to its end by itself has a status of its own, which killing it does not change.
        let _ = self.child.kill();
        let status = self.child.wait();
        match status.as_ref().ok().and_then(ExitStatus::signal).and_then(Signal::from_named_raw) {
            Some(Signal::XCPU) => format!("it took more than {SECONDS} s of a core"),
            Some(Signal::ABORT | Signal::SEGV | Signal::BUS) => format!("it took more than {} MiB, or went too deep", MEMORY_BYTES >> 20),
            Some(Signal::KILL) => format!("its answer could not be read: {error}"),
            _ => format!("rendering ended early: {status:?}"),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
