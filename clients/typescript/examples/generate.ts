// Generation with npm's openai package: a task's name is the model's name.
//
// MANYHATS_HTTP is the server's HTTP address, MANYHATS_TOKEN a token if it requires one.

import OpenAI from "openai";

const baseURL = `${process.env["MANYHATS_HTTP"] ?? "http://127.0.0.1:8000"}/v1`;
const client = new OpenAI({ baseURL, apiKey: process.env["MANYHATS_TOKEN"] ?? "none" });

const question = [{ role: "user" as const, content: "How many customers live in Lisbon?" }];
const answer = await client.chat.completions.create({ model: "sql", messages: question, max_tokens: 32 });
console.log(answer.choices[0]?.message.content);

const stream = await client.chat.completions.create({ model: "sql", messages: question, max_tokens: 32, stream: true });
for await (const chunk of stream) {
  process.stdout.write(chunk.choices[0]?.delta.content ?? "");
}
console.log();
