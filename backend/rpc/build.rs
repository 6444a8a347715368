//! Compiles the protocol with a compiler in Rust: building needs no protoc.

fn main() {
    println!("cargo:rerun-if-changed=proto/replica.proto");
    let files = protox::compile(["proto/replica.proto"], ["proto"]).expect("the protocol compiles");
    tonic_prost_build::configure()
        .compile_fds(files)
        .expect("the protocol's code is written");
}
