//! A pointer of git-lfs: what stands in a clone instead of a large file until `git lfs pull` has fetched it.

/// Of every version (https://git-lfs.com/spec/v1).
const BEGINNING: &[u8] = b"version https://git-lfs.github.com/spec/";

/// What is wrong with a file of this content, if it is a pointer.
pub fn pointer(content: &[u8]) -> Option<String> {
    let says = "it is a pointer of git-lfs and not the file: run `git lfs install && git lfs pull` in the clone, or fetch \
                the model with `tandem download ORG/NAME`";
    content.starts_with(BEGINNING).then(|| says.to_owned())
}
