//! The codec of both sides: a message is weighed before it is read, so that 64 MiB of bytes do not become gigabytes of
//! structures. Not here: how many bytes one may have (`lib`), what it means (`codec`).

use std::marker::PhantomData;

use prost::Message;
use prost::bytes::Buf as _;
use tandem_core::protobuf::{Field, Holds, Shape, tree_bytes};
use tonic::Status;
use tonic::codec::{DecodeBuf, Decoder};
use tonic_prost::{ProstDecoder, ProstEncoder};

use crate::wire;

/// What a message may take in memory. A prompt of a million tokens with a log-probability for each takes a quarter of it.
const TREE_BYTES: usize = 256 << 20;

/// A message whose fields are known here.
pub trait Shaped {
    const SHAPE: Shape;
}

/// Named in the code that is made of the protocol (build.rs).
pub struct Codec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Codec<T, U> {
    fn default() -> Codec<T, U> {
        Codec(PhantomData)
    }
}

impl<T, U> tonic::codec::Codec for Codec<T, U>
where
    T: Message + 'static,
    U: Message + Shaped + Default + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = Scales<U>;

    fn encoder(&mut self) -> ProstEncoder<T> {
        ProstEncoder::default()
    }

    fn decoder(&mut self) -> Scales<U> {
        Scales(ProstDecoder::default())
    }
}

pub struct Scales<U>(ProstDecoder<U>);

impl<U: Message + Shaped + Default> Decoder for Scales<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        // One piece: the buffer holds a whole message.
        let bytes = tree_bytes(buffer.chunk(), U::SHAPE);
        if bytes > TREE_BYTES {
            return Err(Status::resource_exhausted(format!(
                "a message of {} bytes would take {bytes} in memory, the limit is {TREE_BYTES}",
                buffer.remaining()
            )));
        }
        self.0.decode(buffer)
    }
}

// Of every message, by build.rs.
include!(concat!(env!("OUT_DIR"), "/shapes.rs"));

#[cfg(test)]
mod tests {
    use super::*;
    use wire::event::What;

    #[test]
    fn messages_of_nothing_weigh_what_they_become() {
        let event = wire::Event {
            what: Some(What::Token(wire::Scored::default())),
            is_last: false,
        };
        let down = wire::Down {
            events: vec![wire::Events {
                stream: 1,
                events: vec![event; 1000],
            }],
            ..wire::Down::default()
        };
        let bytes = tree_bytes(&down.encode_to_vec(), wire::Down::SHAPE);
        let taken = 1000 * (size_of::<wire::Event>() + size_of::<wire::Scored>());
        assert!((2 * taken..3 * taken).contains(&bytes), "{bytes} for {taken}");
    }
}
