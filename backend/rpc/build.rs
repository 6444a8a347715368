//! Compiles the protocol with a compiler in Rust: building needs no protoc. Beside it, what of each message takes more memory
//! than its bytes (`weighed`).

use std::fmt::Write as _;
use std::path::Path;

use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, FieldDescriptorProto};

fn main() {
    println!("cargo:rerun-if-changed=proto/replica.proto");
    let files = protox::compile(["proto/replica.proto"], ["proto"]).expect("the protocol compiles");
    let messages = files.file.iter().flat_map(|file| &file.message_type);
    let shapes: String = messages.map(shape).collect();
    let out = std::env::var_os("OUT_DIR").expect("cargo names a folder");
    std::fs::write(Path::new(&out).join("shapes.rs"), shapes).expect("the shapes are written");
    tonic_prost_build::configure()
        .codec_path("crate::weighed::Codec")
        .compile_fds(files)
        .expect("the protocol's code is written");
}

fn shape(message: &DescriptorProto) -> String {
    let mut text = format!(
        "impl Shaped for wire::{} {{ const SHAPE: Shape = &[",
        message.name()
    );
    for field in &message.field {
        if let Some(holds) = holds(field) {
            let number = field.number();
            write!(text, "Field {{ number: {number}, holds: Holds::{holds} }},").expect("text grows");
        }
    }
    text + "]; }\n"
}

/// `None`: a text, or a number.
fn holds(field: &FieldDescriptorProto) -> Option<String> {
    let message = || {
        let name = field.type_name().rsplit('.').next().expect("a type has a name");
        format!("Message(size_of::<wire::{name}>(), wire::{name}::SHAPE)")
    };
    Some(match (field.r#type(), field.label()) {
        (Type::Message, _) => message(),
        (Type::Bytes, _) if field.name().ends_with("_json") => "Json".to_owned(),
        // A whole number may have one byte on the wire, a float has as many as in memory.
        (Type::Uint32, Label::Repeated) => "Numbers(4)".to_owned(),
        (Type::Uint64, Label::Repeated) => "Numbers(8)".to_owned(),
        (Type::Float, Label::Repeated) => "Numbers(1)".to_owned(),
        (kind, Label::Repeated) => panic!("{} is a list of {kind:?}: say what one takes", field.name()),
        _ => return None,
    })
}
