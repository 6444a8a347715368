//! The file of a run that W&B was not there for (`run-ID.wandb`), as `wandb sync` reads it. Bytes only. Not here: its folder.
//!
//! A header, then records in LevelDB's log format (its doc/log_format.md; the checksum is zlib's), each a `Record`
//! (wandb/proto/wandb_internal.proto). Rows have the names and the axis that transformers' WandbCallback gives them.

use serde_json::{Map, Value};

use super::protobuf::Message;
use super::{Report, crc, tag};

const HEADER: &[u8] = b":W&B\xe1\xbe\x00";
const BLOCK: usize = 32 << 10;
const RECORD_HEADER: usize = 7;
/// The reader that is needed at least, as W&B's own writer says it.
const MIN_CONSUMER: &str = "0.70.0";
/// The optimizer step, which rows are drawn over.
const STEP: &str = "train/global_step";

pub struct Run<'a> {
    pub id: &'a str,
    pub project: &'a str,
    /// `None`: W&B makes one up.
    pub name: Option<&'a str>,
    pub config: &'a Map<String, Value>,
    /// Seconds since 1970.
    pub began_s: f64,
}

/// Where a file is.
pub struct Log {
    /// Bytes so far.
    at: usize,
    records: u64,
    /// Rows of the run so far.
    rows: u64,
    began_s: f64,
}

impl Log {
    /// A file, and how it begins. `rows`: those that the run has in earlier files.
    pub fn begin(run: &Run, rows: u64) -> (Log, Vec<u8>) {
        let mut log = Log {
            at: HEADER.len(),
            records: 0,
            rows,
            began_s: run.began_s,
        };
        let mut file = HEADER.to_vec();
        let producer = concat!("tandem ", env!("CARGO_PKG_VERSION"));
        let version = Message::default()
            .bytes(1, producer.as_bytes())
            .bytes(2, MIN_CONSUMER.as_bytes());
        log.push(21, Message::default().message(1, version), &mut file);
        let config = run
            .config
            .iter()
            .fold(Message::default(), |config, (key, value)| {
                config.message(1, item(1, key, value))
            });
        let start = Message::default()
            .integer(1, run.began_s as u64)
            .integer(2, (run.began_s.fract() * 1e9) as u64);
        let mut record = Message::default()
            .bytes(1, run.id.as_bytes())
            .bytes(3, run.project.as_bytes())
            .message(4, config);
        if let Some(name) = run.name {
            record = record.bytes(8, name.as_bytes());
        }
        log.push(17, record.message(17, start), &mut file);
        let axis = Message::default().bytes(1, STEP.as_bytes());
        log.push(12, axis, &mut file);
        let options = Message::default().integer(1, 1);
        let all = Message::default()
            .bytes(2, b"*")
            .bytes(4, STEP.as_bytes())
            .message(6, options);
        log.push(12, all, &mut file);
        (log, file)
    }

    /// A row, of `time_s` seconds since 1970.
    pub fn row(&mut self, report: &Report, time_s: f64) -> Vec<u8> {
        let values = report
            .values
            .iter()
            .map(|(name, value)| (tag(name), Value::from(*value)));
        let own = [
            (STEP.to_owned(), Value::from(report.step)),
            ("_timestamp".to_owned(), Value::from(time_s)),
            ("_runtime".to_owned(), Value::from(time_s - self.began_s)),
            ("_step".to_owned(), Value::from(self.rows)),
        ];
        let (mut history, mut summary) = (Message::default(), Message::default());
        for (name, value) in values.chain(own) {
            history = history.message(1, item(2, &name, &value));
            summary = summary.message(1, item(2, &name, &value));
        }
        let step = Message::default().integer(1, self.rows);
        self.rows += 1;
        let mut bytes = vec![];
        self.push(3, summary, &mut bytes);
        self.push(2, history.message(2, step), &mut bytes);
        bytes
    }

    /// The last record, of a run that ended well.
    pub fn end(&mut self, time_s: f64) -> Vec<u8> {
        let mut bytes = vec![];
        let exit = Message::default().integer(2, (time_s - self.began_s).max(0.0) as u64);
        self.push(18, exit, &mut bytes);
        bytes
    }

    /// A record with this field.
    fn push(&mut self, field: u32, message: Message, to: &mut Vec<u8>) {
        self.records += 1;
        let record = Message::default()
            .integer(1, self.records)
            .message(field, message);
        let (mut rest, mut is_first) = (record.0.as_slice(), true);
        loop {
            let room = BLOCK - self.at % BLOCK;
            if room < RECORD_HEADER {
                to.resize(to.len() + room, 0);
                self.at += room;
                continue;
            }
            let (now, later) = rest.split_at(rest.len().min(room - RECORD_HEADER));
            let kind: u8 = match (is_first, later.is_empty()) {
                (true, true) => 1,
                (true, false) => 2,
                (false, false) => 3,
                (false, true) => 4,
            };
            let checksum = crc(ZLIB, &[&[kind], now].concat());
            to.extend(checksum.to_le_bytes());
            to.extend((now.len() as u16).to_le_bytes());
            to.push(kind);
            to.extend(now);
            self.at += RECORD_HEADER + now.len();
            if later.is_empty() {
                return;
            }
            (rest, is_first) = (later, false);
        }
    }
}

/// The polynomial of zlib's checksum, bits turned around.
const ZLIB: u32 = 0xedb8_8320;

/// A `ConfigItem`, a `HistoryItem` or a `SummaryItem`; the number of its key.
fn item(key: u32, name: &str, value: &Value) -> Message {
    Message::default()
        .bytes(key, name.as_bytes())
        .bytes(16, value.to_string().as_bytes())
}
