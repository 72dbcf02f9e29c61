// What the npm package sees of a server; prints one JSON value.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: process.argv[3], maxRetries: 0 });
const messages = [{ role: "user", content: "hi" }];
const seen = {};

seen.models = (await client.models.list()).data.map((model) => model.id);
const chat = await client.chat.completions.create({ model: "m", messages });
seen.chat = [chat.choices[0].message.content, chat.choices[0].finish_reason, chat.system_fingerprint];

let streamed = "";
const stream = await client.chat.completions.create({
  model: "m",
  messages,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  if (chunk.usage) seen.usage = chunk.usage.total_tokens;
}
seen.streamed = streamed;

const runner = client.chat.completions.stream({ model: "m", messages });
seen.gathered = (await runner.finalChatCompletion()).choices[0].message.content;

const text = await client.completions.create({ model: "m", prompt: "x", logprobs: 1 });
seen.text = [text.choices[0].text, text.choices[0].logprobs.tokens.length];
const vectors = await client.embeddings.create({ model: "m", input: ["a", "b"] });
seen.embeddings = vectors.data.map((each) => each.embedding.length);

seen.errors = [];
for (const request of [
  () => client.chat.completions.create({ model: "absent", messages }),
  () => client.chat.completions.create({ model: "m", messages, temperature: -1 }),
  () => new OpenAI({ baseURL: client.baseURL, apiKey: "wrong", maxRetries: 0 }).models.list(),
]) {
  try {
    await request();
    seen.errors.push(null);
  } catch (error) {
    seen.errors.push([error.constructor.name, error.status, error.param ?? null]);
  }
}

// An aborted stream ends quietly on both sides.
const controller = new AbortController();
const aborted = await client.completions.create(
  { model: "m", prompt: "x", stream: true },
  { signal: controller.signal },
);
controller.abort();
for await (const _ of aborted) {
  // what was on its way
}
seen.aborted = true;
console.log(JSON.stringify(seen));
