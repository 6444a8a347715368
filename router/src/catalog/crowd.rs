//! Who comes in while places are few: among keys, and among the connections of a key. Numbers alone, for the catalog to count.

/// Sequences if a wish were granted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Crowd {
    pub all: u32,
    /// Of the key that asks, and how many keys have some, that one included.
    pub key: Part,
    /// Of the connection that asks, among those of its key.
    pub connection: Part,
    /// Of the request that asks.
    pub request: u32,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub own: u32,
    pub of: u32,
}

impl Crowd {
    /// A key alone may take every place. When others are there and somebody waits, each has its share, and who is within
    /// its share comes in although others have taken more than theirs: up to twice as many places. So it is among the
    /// connections of a key, too, which may be all that tells clients apart. A connection that has nothing else under way
    /// brings one request whatever its size.
    pub fn fits(self, slots: u32, max_waiting: u32) -> bool {
        let Crowd {
            all,
            key,
            connection,
            request,
        } = self;
        let places = slots.saturating_add(max_waiting);
        let is_first = connection.own == request && all - request <= places;
        let key_share = places / key.of.max(1);
        let most = match key.of {
            0 | 1 => places,
            _ => places.saturating_mul(2),
        };
        let of_key = key.own <= key_share && all <= most;
        let of_connection = connection.of > 1
            && connection.own <= key_share / connection.of
            && all <= places.saturating_mul(2);
        all <= slots || is_first || of_key || of_connection
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_shared_when_they_are_few() {
        // all, own, keys with 4 slots and 6 waiting places
        for (all, own, clients, fits) in [
            (10, 10, 1, true),
            (11, 11, 1, false),
            // Nobody waits: whoever comes, comes in.
            (4, 3, 2, true),
            // Over its share of 5 while another is there, and within it.
            (10, 6, 2, false),
            (10, 5, 2, true),
            // The other has taken all; this one is within its share.
            (11, 1, 2, true),
            (15, 5, 2, true),
            (20, 3, 3, true),
            (21, 3, 3, false),
        ] {
            let crowd = Crowd {
                all,
                key: Part { own, of: clients },
                connection: Part { own, of: 1 },
                request: 1,
            };
            assert_eq!(crowd.fits(4, 6), fits, "{crowd:?}");
        }
    }

    #[test]
    fn a_connection_has_a_part_of_its_keys_share() {
        // all, of the key, of the connection, connections, of the request with 4 slots and 6 waiting places and one key
        for (all, key, own, of, request, fits) in [
            (10, 10, 10, 1, 1, true),
            (11, 11, 11, 1, 1, false),
            // Another connection has taken all places.
            (11, 11, 1, 2, 1, true),
            (15, 15, 5, 2, 1, true),
            (16, 16, 6, 2, 1, false),
            (21, 21, 5, 2, 1, false),
            // There is room: nobody is counted.
            (10, 10, 9, 5, 1, true),
            // One request of any size, where there is any place, and nothing else on its connection.
            (100, 100, 100, 1, 100, true),
            (110, 110, 100, 3, 100, true),
            (111, 111, 100, 3, 100, false),
            (100, 100, 100, 1, 99, false),
        ] {
            let crowd = Crowd {
                all,
                key: Part { own: key, of: 1 },
                connection: Part { own, of },
                request,
            };
            assert_eq!(crowd.fits(4, 6), fits, "{crowd:?}");
        }
    }
}
