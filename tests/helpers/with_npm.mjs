// Runs in a directory with the npm packages openai, ai and @ai-sdk/openai: what their users do, across a sleep; prints JSON.
// usage: node with_npm.mjs URL MODEL
import OpenAI from "openai";
import { createOpenAI } from "@ai-sdk/openai";
import { generateObject, generateText, jsonSchema, streamText, tool } from "ai";

const [url, model] = process.argv.slice(2);
const baseURL = `${url}/v1`, apiKey = "none", question = "What is 2+2? Answer with a number.";
const messages = [{ role: "user", content: question }];
const place = {
  type: "object",
  properties: { kind: { enum: ["sea", "river"] }, salty: { type: "boolean" } },
  required: ["kind", "salty"],
  additionalProperties: false,
};

async function ofOpenAI(client) {
  const asked = { model, messages, temperature: 0, max_tokens: 20 };
  const forced = {
    tools: [{ type: "function", function: { name: "depth_of", parameters: place } }],
    tool_choice: { type: "function", function: { name: "depth_of" } },
  };
  const whole = await client.chat.completions.create(asked);
  let streamed = "";
  for await (const chunk of await client.chat.completions.create({ ...asked, stream: true }))
    streamed += chunk.choices[0]?.delta?.content ?? "";
  const called = await client.chat.completions.create({ ...asked, ...forced, max_tokens: 200 });
  const call = called.choices[0].message.tool_calls[0].function;
  const format = { type: "json_schema", json_schema: { name: "place", schema: place, strict: true } };
  const formed = await client.chat.completions.create({ ...asked, max_tokens: 200, response_format: format });
  return {
    chat: whole.choices[0].message.content,
    stream: streamed,
    tool: [call.name, Object.keys(JSON.parse(call.arguments)).sort()],
    structured: Object.keys(JSON.parse(formed.choices[0].message.content)).sort(),
  };
}

async function ofSdk(chosen) {
  const asked = { model: chosen, prompt: question, temperature: 0, maxOutputTokens: 20, maxRetries: 0 };
  let streamed = "";
  for await (const piece of streamText(asked).textStream) streamed += piece;
  const called = await generateText({
    ...asked,
    maxOutputTokens: 200,
    tools: { depth_of: tool({ description: "How deep a place is", inputSchema: jsonSchema(place) }) },
    toolChoice: { type: "tool", toolName: "depth_of" },
  });
  const formed = await generateObject({ ...asked, maxOutputTokens: 200, schema: jsonSchema(place) });
  return {
    chat: (await generateText(asked)).text,
    stream: streamed,
    tool: [called.toolCalls[0].toolName, Object.keys(called.toolCalls[0].input).sort()],
    structured: Object.keys(formed.object).sort(),
  };
}

async function statusOf(work) {
  try {
    await work;
  } catch (error) {
    return error.status ?? error.statusCode;
  }
}

const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const provider = createOpenAI({ baseURL, apiKey });
const sdk = { "ai chat": provider.chat(model), "ai responses": provider.responses(model) };
const found = { openai: await ofOpenAI(client) };
for (const [kind, chosen] of Object.entries(sdk)) found[kind] = await ofSdk(chosen);

await fetch(`${url}/sleep`, { method: "POST" });
found.openai.asleep = await statusOf(client.chat.completions.create({ model, messages }));
for (const [kind, chosen] of Object.entries(sdk))
  found[kind].asleep = await statusOf(generateText({ model: chosen, prompt: question, maxRetries: 0 }));
await fetch(`${url}/wake_up`, { method: "POST" });
found.openai.after = (await client.chat.completions.create({ model, messages, temperature: 0, max_tokens: 20 })).choices[0].message.content;
for (const [kind, chosen] of Object.entries(sdk))
  found[kind].after = (await generateText({ model: chosen, prompt: question, temperature: 0, maxOutputTokens: 20 })).text;
console.log(JSON.stringify(found));
