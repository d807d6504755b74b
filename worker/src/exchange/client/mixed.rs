//! Answers of heads that read several bases: the first pool makes the answer, the others follow it, and what they see of its tokens is carried to it.
//!
//! Every pool keeps memory for the whole sequence from its beginning, so they are asked one after the other, always in the same order whatever the head:
//! two answers never wait for each other. Only when all have begun does anything run.

use std::pin::pin;
use std::sync::Arc;

use carryon_crds::wire::HeadShape;
use futures::future::try_join_all;
use futures::stream::{BoxStream, unfold};
use futures::{FutureExt as _, StreamExt as _};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;

use super::{ClientError, Endpoint, Following, PoolClient, Sending};
use crate::exchange::mixing::{FollowRequest, FollowTokens, TapRows};
use crate::exchange::wire::{GenerateEvent, GenerateRequest};

/// Events of an answer.
pub type Events = BoxStream<'static, Result<GenerateEvent, ClientError>>;

impl PoolClient {
    /// As [`Self::generate`], with a head of this shape: where it reads further bases and has a say, the pools of these are asked too, in its order.
    ///
    /// # Errors
    /// As there, of any of the pools.
    pub async fn generate_with(
        &self,
        others: &[&Self],
        shape: &HeadShape,
        endpoint: Option<&Endpoint>,
        request: &GenerateRequest,
    ) -> Result<Events, ClientError> {
        if shape.others.is_empty() || request.alpha.unwrap_or(shape.alpha) == 0.0 {
            return Ok(self.generate(endpoint, request).await?.boxed());
        }
        let widths: Arc<[usize]> = shape.tap_widths().split_off(shape.taps.count()).into();
        // The same for all clients of these pools: by base, and of two of one base by where they are.
        let mut order: Vec<_> = others.iter().enumerate().map(|(place, pool)| (pool.turn(), Some(place))).collect();
        order.push((self.turn(), None));
        order.sort();
        let (mut answer, mut following) = (None, Vec::with_capacity(others.len()));
        for (_, place) in order {
            let Some(place) = place else {
                answer = Some(self.generate_mixed(endpoint, request, &widths).await?);
                continue;
            };
            let read = &shape.others[place];
            let follow = FollowRequest { prompt: request.prompt.clone(), max_tokens: request.max_tokens, taps: read.taps.clone() };
            following.push((place, others[place].follow(&follow, read.hidden_size as usize).await?));
        }
        following.sort_unstable_by_key(|(place, _)| *place);
        let (told, following): (Vec<_>, Vec<_>) = following.into_iter().map(|(_, pool)| pool).unzip();
        // This pool is one of them.
        let Some((rows, events)) = answer else { return Ok(futures::stream::empty().boxed()) };
        let (out, made) = unbounded_channel();
        let mut making = JoinSet::new();
        making.spawn(make(events.boxed(), told, carry(following, rows, widths), out));
        // Dropped, it ends the answer in all pools.
        let events = unfold((made, making), async |(mut made, making)| Some((made.recv().await?, (made, making))));
        Ok(events.boxed())
    }
}

/// Has the pools make an answer, and tells those who follow of its tokens. It goes on however slowly its client reads: the pools keep memory for it.
async fn make(
    mut events: Events,
    told: Vec<Sending>,
    carrying: impl Future<Output = Result<(), ClientError>>,
    out: UnboundedSender<Result<GenerateEvent, ClientError>>,
) {
    let mut carrying = pin!(carrying.fuse());
    loop {
        let event = tokio::select! {
            // What broke first is why the other breaks too.
            biased;
            Err(error) = &mut carrying => Err(error),
            event = events.next() => match event {
                Some(event) => event,
                None => return,
            },
        };
        if let Ok(GenerateEvent::Token(token)) = &event {
            let line = FollowTokens { tokens: vec![token.token] }.line();
            for pool in &told {
                // Of one that is gone no rows come either: that is where it is seen.
                let _ = pool.send(line.clone()).await;
            }
        }
        let over = event.is_err();
        if out.send(event).is_err() || over {
            return;
        }
    }
}

/// Sends the rows of all who follow, as soon as all have them, until the first pool takes no more.
async fn carry(mut following: Vec<Following>, rows: Sending, widths: Arc<[usize]>) -> Result<(), ClientError> {
    let mut held = vec![TapRows::default(); following.len()];
    loop {
        try_join_all(following.iter_mut().zip(&mut held).map(async |(following, held)| {
            while held.rows == 0 {
                *held = following.next().await?;
            }
            Ok(())
        }))
        .await?;
        let common = held.iter().map(|rows| rows.rows).min().unwrap_or(0);
        let joined = TapRows::join(held.iter_mut().map(|rows| rows.split_to(common)));
        if rows.send(joined.encode(&widths)).await.is_err() {
            // Its events say why.
            return Ok(());
        }
    }
}
