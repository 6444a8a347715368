//! Random public ids: 24 letters and digits (142 bits) after a prefix that says what they name.

const LENGTH: usize = 24;
const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

pub fn file() -> String {
    format!("file-{}", random())
}

pub fn job() -> String {
    format!("ftjob-{}", random())
}

pub fn batch() -> String {
    format!("batch_{}", random())
}

/// Of one request of a batch, in the file of its answers.
pub fn batch_request() -> String {
    format!("batch_req_{}", random())
}

pub(crate) fn upload() -> String {
    format!("upload_{}", random())
}

pub(crate) fn part() -> String {
    format!("part_{}", random())
}

/// Of a client that trains call by call; it lives in paths of what it saved.
pub fn session() -> String {
    format!("tnk-{}", random())
}

/// Of a result that a client comes back for.
pub fn future() -> String {
    format!("fut-{}", random())
}

pub(crate) fn key() -> String {
    format!("key-{}", random())
}

/// What nobody guesses.
pub(crate) fn secret() -> [u8; 32] {
    let mut bytes = [0; 32];
    entropy(&mut bytes);
    bytes
}

pub(crate) fn event() -> String {
    format!("ftevent-{}", random())
}

pub(crate) fn checkpoint() -> String {
    format!("ftckpt_{}", random())
}

/// 31 random bits: a seed in the range the API allows.
pub fn seed() -> u64 {
    let mut bytes = [0; 4];
    entropy(&mut bytes);
    u64::from(u32::from_le_bytes(bytes) >> 1)
}

pub(crate) fn random() -> String {
    let mut id = String::with_capacity(LENGTH);
    let mut bytes = [0; 2 * LENGTH];
    while id.len() < LENGTH {
        entropy(&mut bytes);
        // 248 = 4 x 62: what is above would make some letters likelier.
        let letters = bytes
            .iter()
            .filter(|&&byte| byte < 248)
            .map(|byte| char::from(ALPHABET[usize::from(byte % 62)]));
        id.extend(letters.take(LENGTH - id.len()));
    }
    id
}

fn entropy(bytes: &mut [u8]) {
    // A system call: it needs no descriptor, of which there may be none left.
    getrandom::fill(bytes).expect("the system has random bytes");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_long_plain_and_do_not_repeat() {
        let ids: std::collections::HashSet<String> = (0..1000).map(|_| random()).collect();
        assert_eq!(ids.len(), 1000);
        assert!(
            ids.iter()
                .all(|id| id.len() == LENGTH && id.bytes().all(|byte| byte.is_ascii_alphanumeric()))
        );
        assert!((0..100).all(|_| seed() <= 2_147_483_647));
    }
}
