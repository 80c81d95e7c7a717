// The endpoints, as the server's own OpenAPI description has them.

function made(name, text = "", className = "") {
  const element = document.createElement(name);
  element.textContent = text;
  if (className) element.className = className;
  return element;
}

const described = await (await fetch("/openapi.json")).json();
document.querySelector("#about").textContent = described.info.description.replaceAll("`", "");

function resolved(schema) {
  const name = schema?.$ref?.split("/").pop();
  return name ? described.components.schemas[name] : schema;
}

function kind(schema) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.anyOf) return schema.anyOf.map(kind).join(" | ");
  if (schema.type === "array") return `list of ${kind(schema.items) || "anything"}`;
  return schema.type ?? "anything";
}

function table(rows) {
  const head = made("tr");
  head.append(...["Field", "Type", "Default", ""].map((text) => made("th", text)));
  const element = made("table");
  element.append(head);
  for (const [name, schema, needed] of rows) {
    const line = made("tr");
    const usual = needed ? "needed" : schema.default === undefined ? "" : JSON.stringify(schema.default);
    line.append(...[name, kind(schema), usual, schema.description ?? ""].map((text) => made("td", text)));
    element.append(line);
  }
  const around = made("div", "", "table");
  around.append(element);
  return around;
}

for (const [path, methods] of Object.entries(described.paths)) {
  for (const [method, about] of Object.entries(methods)) {
    const title = made("h3", path);
    title.prepend(made("span", method.toUpperCase(), "method"));
    const section = made("section", "", "endpoint");
    section.append(title, made("p", about.description ?? about.summary));
    const given = (about.parameters ?? []).map((each) => [each.name, each.schema, each.required]);
    const content = Object.values(about.requestBody?.content ?? {})[0];
    const body = resolved(content?.schema);
    const needed = new Set(body?.required ?? []);
    given.push(...Object.entries(body?.properties ?? {}).map(([name, schema]) => [name, schema, needed.has(name)]));
    if (given.length) section.append(table(given));
    document.querySelector("#endpoints").append(section);
  }
}
