// Asks a gateway through the official `openai` client of JavaScript and the AI SDK, and checks what they get.
// usage: CARRYON_NODE=FOLDER node client.mjs URL MODEL; the folder holds node_modules.
import assert from "node:assert/strict";
import { createRequire } from "node:module";

const load = createRequire(`${process.env.CARRYON_NODE}/`);
const OpenAI = load("openai").default;
const { generateText, streamText } = load("ai");
const { createOpenAICompatible } = load("@ai-sdk/openai-compatible");
const { createOpenAI } = load("@ai-sdk/openai");

const [url, model] = process.argv.slice(2);
const [base, apiKey] = [`${model}-base`, "not-needed"];
const messages = [{ role: "user", content: "Repeat: smörgås 🦐. Then count to five." }];
const client = new OpenAI({ baseURL: url, apiKey, maxRetries: 0 });

/** What the clients agree on: the answer's text, by the model's name. */
const texts = {};

async function official() {
  const names = [];
  for await (const entry of client.models.list()) names.push(entry.id);
  assert.deepEqual(names, [model, base]);
  assert.equal((await client.models.retrieve(base)).id, base);

  const hints = { user: "anna", safety_identifier: "5f4d", prompt_cache_key: "k", metadata: { topic: "demo" }, service_tier: "auto" };
  const asked = { messages, temperature: 0, max_tokens: 24, ...hints };
  for (const name of names) {
    const whole = await client.chat.completions.create({ model: name, ...asked });
    const text = whole.choices[0].message.content;
    const stream = client.chat.completions.stream({ model: name, stream_options: { include_usage: true }, ...asked });
    let pieces = 0;
    stream.on("content", () => pieces++);
    const final = await stream.finalChatCompletion();
    assert.equal(final.choices[0].message.content, text);
    assert.ok(pieces > 2, "not streamed in pieces");
    assert.deepEqual(final.usage, whole.usage);
    assert.equal(final.choices[0].finish_reason, whole.choices[0].finish_reason);
    texts[name] = text;
  }

  const scored = await client.completions.create({ model, prompt: "One, two, three,", max_tokens: 8, temperature: 0, logprobs: 2, echo: true });
  const { tokens, token_logprobs } = scored.choices[0].logprobs;
  assert.equal(tokens.join(""), scored.choices[0].text);
  assert.ok(token_logprobs[0] === null && token_logprobs.slice(1).every((logprob) => logprob <= 0));

  // A client that has read enough goes away; the next one is answered.
  const left = await client.chat.completions.create({ model, ...asked, stream: true });
  for await (const _ of left) break;
  const refused = (change, kind) => assert.rejects(client.chat.completions.create({ model, ...asked, ...change }), kind);
  await refused({ model: "nothing" }, OpenAI.NotFoundError);
  await refused({ temperature: 3 }, (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature");
}

/** The AI SDK through both of its providers that speak chat completions. */
async function sdk() {
  const compatible = createOpenAICompatible({ name: "carry-on", baseURL: url, apiKey, includeUsage: true });
  const openai = createOpenAI({ baseURL: url, apiKey });
  const asked = { messages, temperature: 0, maxOutputTokens: 24, maxRetries: 0 };
  for (const name of [model, base]) {
    for (const chat of [compatible(name), openai.chat(name)]) {
      const whole = await generateText({ model: chat, ...asked });
      assert.equal(whole.text, texts[name]);
      assert.ok(["stop", "length"].includes(whole.finishReason), whole.finishReason);
      const stream = streamText({ model: chat, ...asked, onError: ({ error }) => assert.fail(error) });
      const pieces = [];
      for await (const piece of stream.textStream) pieces.push(piece);
      assert.equal(pieces.join(""), texts[name]);
      assert.ok(pieces.length > 2, "not streamed in pieces");
      assert.deepEqual((await stream.usage).totalTokens, whole.usage.totalTokens);
    }
  }
  const completion = { prompt: "1 2 3 4 5 6", maxOutputTokens: 20, temperature: 1, seed: 7, stopSequences: ["\n"], maxRetries: 0 };
  const once = async () => (await generateText({ model: compatible.completionModel(model), ...completion })).text;
  const text = await once();
  assert.equal(await once(), text);
  assert.ok(!text.includes("\n"));
  await assert.rejects(generateText({ model: compatible("nothing"), ...asked }), (error) => error.statusCode === 404);
}

await official();
await sdk();
console.log("ok");
