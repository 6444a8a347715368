//! Real servers for tests: a throw-away Postgres from the system's package. Shared with the router's tests by path.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};

/// Where Debian keeps the server's programs.
const FOLDERS: &str = "/usr/lib/postgresql";
/// Makes a cluster, starts it on a socket in its folder, says where, and ends with its standard input: with us.
const SCRIPT: &str = r#"
d=$(mktemp -d)
"$0/initdb" -D "$d/data" -U postgres -A trust --no-sync >"$d/log" 2>&1 &&
"$0/pg_ctl" -D "$d/data" -w -l "$d/log" -o "$(echo "$1" | sed "s|FOLDER|$d|")" start >/dev/null 2>&1 &&
echo "$d" || { cat "$d/log" >&2; exit 1; }
cat >/dev/null
"$0/pg_ctl" -D "$d/data" -m immediate stop >/dev/null 2>&1
rm -rf "$d"
"#;

/// Of the server: a socket in its folder, and no care for power cuts.
const OPTIONS: &str = "-k FOLDER -c listen_addresses= -c fsync=off";

struct Server {
    folder: String,
    _child: Mutex<Child>,
}

/// URL of a fresh, empty database. `None`, and a line that says so: no Postgres is installed here. With
/// `TEST_SERVICES=required` that is a failure.
pub fn database() -> Option<String> {
    static SERVER: OnceLock<Option<Server>> = OnceLock::new();
    static DATABASES: AtomicU32 = AtomicU32::new(0);
    let Some(Server { folder, .. }) = SERVER.get_or_init(start) else {
        let required = std::env::var("TEST_SERVICES").is_ok_and(|value| value == "required");
        assert!(
            !required,
            "no Postgres below {FOLDERS}: install the package postgresql"
        );
        println!("skipped: no Postgres below {FOLDERS}");
        return None;
    };
    let name = format!("test{}", DATABASES.fetch_add(1, Ordering::Relaxed));
    let made = Command::new(programs()?.join("createdb"))
        .args(["-h", folder, "-U", "postgres", &name])
        .status()
        .expect("createdb runs");
    assert!(made.success());
    Some(format!("postgres://postgres@localhost/{name}?host={folder}"))
}

/// A Postgres of one test's own, which it may stop and start again.
pub struct Own(Server);

impl Own {
    /// `None`: as [`database`].
    pub fn new() -> Option<Own> {
        // Says that none is installed, or fails where one is required.
        database()?;
        start().map(Own)
    }

    pub fn url(&self) -> String {
        format!("postgres://postgres@localhost/postgres?host={}", self.0.folder)
    }

    /// At once, as a machine that is lost.
    pub fn stop(&self) {
        self.control(&["-m", "immediate", "stop"]);
    }

    pub fn start(&self) {
        let folder = &self.0.folder;
        let (log, options) = (format!("{folder}/log"), OPTIONS.replace("FOLDER", folder));
        self.control(&["-w", "-l", &log, "-o", &options, "start"]);
    }

    fn control(&self, words: &[&str]) {
        let status = as_postgres(&programs().expect("it runs").join("pg_ctl"))
            .args(["-D", &format!("{}/data", self.0.folder)])
            .args(words)
            .stdout(Stdio::null())
            .status()
            .expect("pg_ctl runs");
        assert!(status.success(), "{words:?}");
    }
}

fn programs() -> Option<PathBuf> {
    let versions = std::fs::read_dir(FOLDERS).ok()?;
    let mut found: Vec<PathBuf> = versions.flatten().map(|entry| entry.path().join("bin")).collect();
    found.retain(|bin| bin.join("initdb").exists());
    found.sort();
    found.pop()
}

fn start() -> Option<Server> {
    let programs = programs()?;
    let mut child = as_postgres(Path::new("sh"))
        .arg("-c")
        .arg(SCRIPT)
        .arg(&programs)
        .arg(OPTIONS)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a shell starts");
    let mut folder = String::new();
    BufReader::new(child.stdout.take().expect("piped"))
        .read_line(&mut folder)
        .expect("the script says where");
    let folder = folder.trim().to_owned();
    assert!(!folder.is_empty(), "Postgres did not start");
    Some(Server {
        folder,
        _child: Mutex::new(child),
    })
}

/// The server refuses to run as root.
fn as_postgres(program: &Path) -> Command {
    let root = Command::new("id").arg("-u").output().expect("id runs").stdout == b"0\n";
    let mut command = match root {
        true => {
            let mut command = Command::new("runuser");
            command.args(["-u", "postgres", "--"]).arg(program);
            command
        }
        false => Command::new(program),
    };
    command.current_dir("/");
    command
}
